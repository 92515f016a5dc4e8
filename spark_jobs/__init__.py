"""Spark jobs that turn raw corpora into token tables. The command lines call these functions; so may a notebook.

>>> from spark_jobs import tokenize_table, shuffle_tables, repartition_table, generate_table  # doctest: +SKIP
>>> from spark_jobs import tokenize, shuffle, pack  # doctest: +SKIP

Each takes inputs, an output folder and keyword parameters, and returns the manifest(s) it wrote. They run on the active
Spark session, or on ``spark=``. ``generate(df, model=...)`` is the DataFrame of what ``generate_table`` writes;
``tokenize``, ``shuffle`` and ``pack`` make functions for ``df.transform``, see :mod:`spark_jobs.transforms`.

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
