"""Where a row goes: hashes instead of ``rand()``, so that any cluster, and any retry, places it alike."""

import heapq
from collections.abc import Mapping

from pyspark.sql import Column
from pyspark.sql import functions as F


def row_hash(purpose: str, seed: int, *key: Column) -> Column:
    """64 bits that depend on all of ``key``; different purposes and seeds give independent ones."""
    return F.xxhash64(F.lit(purpose), F.lit(seed).cast("long"), *key)


def block_of(sort_key: Column, num_block: int) -> Column:
    """Cut the signed 64-bit range into ``num_block`` equal stretches: the number (int) rises with ``sort_key``."""
    top = F.shiftright(sort_key, 33) + F.lit(1 << 30).cast("long")  # 31 bits: the product below fits into 63
    return F.shiftright(top * F.lit(num_block).cast("long"), 31).cast("int")


def below_fraction(purpose: str, seed: int, fraction: float, *key: Column) -> Column:
    """True for about ``fraction`` of all keys, the same ones whenever and wherever it is asked."""
    return F.shiftrightunsigned(row_hash(purpose, seed, *key), 11) < F.lit(int(fraction * 2**53)).cast("long")


def is_held_out(seed: int, doc_id: Column, fraction: float) -> Column:
    """True for about ``fraction`` of all ids; the same for every row of an id."""
    return below_fraction("holdout", seed, fraction, doc_id)


def balance(weights: Mapping[int, int], bins: int) -> dict[int, int]:
    """Longest processing time first: the heaviest bucket goes to the lightest bin. Returns bucket -> bin."""
    heap = [(0, index) for index in range(bins)]
    assignment = {}
    for bucket, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
        load, index = heapq.heappop(heap)
        assignment[bucket] = index
        heapq.heappush(heap, (load + weight, index))
    return assignment
