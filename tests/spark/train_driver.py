"""A notebook's stand-in: ``python train_driver.py MASTER`` makes a session and trains for every line of JSON on stdin.

To stdout go the log and then a line that begins with ``came:``, and says of what kind the end was.
"""

import json
import sys

from pyspark.sql import SparkSession

from fft.errors import UserError
from fft.spark import train_on_cluster


def main() -> None:
    builder = SparkSession.builder.master(sys.argv[1]).config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.executor.memory", "512m")
    spark = builder.config("spark.log.level", "OFF").config("spark.ui.showConsoleProgress", "false").getOrCreate()
    print("came: session", flush=True)
    while line := sys.stdin.readline():
        try:
            result = train_on_cluster(**json.loads(line), use_gpu=False, log=say)
            end = {"result": [result.model, result.run, result.metrics]}
        except UserError as error:
            end = {"error": str(error)}
        except KeyboardInterrupt:
            end = {"interrupted": True}
        say(f"came: {json.dumps(end)}")
    spark.stop()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
