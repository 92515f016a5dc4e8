"""Spark jobs that turn raw corpora into token tables. The command lines call these functions; so may a notebook.

>>> from spark_jobs import repartition_table, shuffle_tables, tokenize_table
>>> made = tokenize_table("corpus.jsonl", "tokens", "tokenizer", keep=["url"])
>>> made.rows, made.tokens == made.trained_tokens + made.untrained_tokens
(60, True)
>>> split = shuffle_tables({"web": "tokens"}, "shuffled", holdout=0.2, keep=["url"])
>>> sorted(split), split["train"].rows + split["validation"].rows
(['train', 'validation'], 60)
>>> packed = repartition_table("shuffled", "packed", max_len=64)
>>> packed["train"].seq_len, packed["train"].datasets, packed["train"].kept
(64, ['web'], ('url',))
>>> packed.plot().save("packed.svg")  # in a notebook, a cell that ends with `packed.plot()` or `packed` shows it

Each takes inputs, an output folder and keyword parameters, called as the flags are, and returns the manifest(s) it
wrote. What goes wrong is one sentence that names parameters:

>>> shuffle_tables("tokens", "shuffled")
Traceback (most recent call last):
fft.errors.UserError: `output` ... exists: give `overwrite=True` to replace it, or another folder.

They run on the active Spark session, or on ``spark=``. ``generate(df, model=...)`` is the DataFrame of what
``generate_table`` writes; ``tokenize``, ``shuffle`` and ``pack`` make functions for ``df.transform``, see
:mod:`spark_jobs.transforms`.

Two of these names are those of scripts in this folder, too. Imported as modules of this package, which nothing needs,
the scripts leave their names to the functions.
"""

from importlib import import_module

import fft as _fft  # noqa: F401  before all else: it leaves the current folder out of Python's path

_HOMES = {
    "generate": "generate_job",
    "generate_table": "generate_job",
    "get_session": "runtime.session",
    "pack": "transforms",
    "repartition_table": "repartition_job",
    "shuffle": "transforms",
    "shuffle_tables": "shuffle_job",
    "tokenize": "transforms",
    "tokenize_table": "tokenize_job",
    "write_report": "token_table.picture",
}

__all__ = [
    "generate",
    "generate_table",
    "get_session",
    "pack",
    "repartition_table",
    "shuffle",
    "shuffle_tables",
    "tokenize",
    "tokenize_table",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Import a function's module when it is first asked for: ``--help`` and Python workers need little of this."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
