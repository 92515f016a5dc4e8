"""Keep the answers that a check accepts, one of those to a prompt that are alike: ``spark-submit examples/accept.py
SAMPLES ACCEPTED``. Put your own check in its place: any expression of Spark's, a join with the right answers, a model.
"""

import sys

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F


def accepts() -> Column:
    """Whether an answer is some text, without pieces of characters."""
    return (F.length(F.trim("text")) > 0) & ~F.col("text").contains("\ufffd")


def accepted(samples: DataFrame) -> DataFrame:
    """The rows that are kept."""
    return samples.where(accepts()).dropDuplicates(["messages"])


if __name__ == "__main__":
    table, output = sys.argv[1:]
    session = SparkSession.builder.appName("accept").getOrCreate()
    accepted(session.read.parquet(table)).write.mode("overwrite").parquet(output)
