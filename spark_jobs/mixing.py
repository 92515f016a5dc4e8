"""Mixture weights: how often each row of a dataset occurs."""

import math
from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from fft.errors import UserError
from spark_jobs.runtime.hashing import below_fraction


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """A weight for each dataset, 1 where none is given. Raises :class:`UserError` for what is no name or weight."""
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise UserError(f"`weights` names {', '.join(unknown)}, but the tables are {', '.join(names)}.")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"`weights` {name}={weight}: a weight must be 0 or more.")
    given = {name: float(weights.get(name, 1.0)) for name in names}
    if not any(given.values()):
        raise UserError("`weights` are all 0: no row would be left.")
    return given


def often_by(weight_by: str, weights: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    """How often each row of a dataset occurs, of datasets with so many ``tokens``: the weights themselves, or where
    they are shares of tokens, as often as gives the mixture these shares and as many tokens as all have together.

    Raises :class:`UserError` as :func:`check_weights`, and for shares that leave out a dataset or that it cannot have.
    """
    given = check_weights(weights, list(tokens))
    if weight_by != "tokens":
        return given
    missing = [name for name in tokens if name not in weights]
    if missing:
        names = ", ".join(missing)
        raise UserError(f'`weights` has no {names}: with `weight_by="tokens"` each table needs a share, 0 for none.')
    empty = [name for name, share in given.items() if share and not tokens[name]]
    if empty:
        raise UserError(f"`weights` gives a share to {empty[0]}, which has no tokens: leave the table out.")
    scale = sum(tokens.values()) / sum(given.values())
    return {name: share and share * scale / tokens[name] for name, share in given.items()}


def with_copies(df: DataFrame, weights: Mapping[str, float], seed: int, name: Column) -> DataFrame:
    """Each row as often as its dataset's weight says, or once if it has none, numbered from 0 in a column ``copy``.

    Weight 2.3: every row twice, and three in ten documents, chosen by a hash of their name, a third time. Rows that
    are not ``kept`` are there to meet every copy of any other row, so they have as many as the largest weight asks for.
    """
    if all(weight == 1 for weight in weights.values()):
        return df.withColumn("copy", F.lit(0))
    copies = F.lit(1)
    for dataset, weight in weights.items():
        once_more = below_fraction("weight", seed, weight - math.floor(weight), F.col("dataset"), name)
        own = F.lit(math.floor(weight)) + F.when(once_more, 1).otherwise(0)
        copies = F.when(F.col("dataset") == dataset, own).otherwise(copies)
    most = F.lit(math.ceil(max(1, *weights.values())))
    counted = df.withColumn("copies", F.when(F.col("kept"), copies).otherwise(most)).where(F.col("copies") > 0)
    return counted.withColumn("copy", F.explode(F.sequence(F.lit(0), F.col("copies") - 1))).drop("copies")
