"""Parameters of the jobs, checked alike whether they come from a command line or from a notebook."""

import re
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fft.errors import UserError

_NAME = re.compile(r"\w+(\.\w+){1,2}")
#: Parameters that take one of a few words, the first by default.
CHOICES = {
    "task": ("pretrain", "chat", "preference"),
    "eos": ("auto", "always", "never"),
    "on_error": ("fail", "quarantine"),
    "format": ("parquet", "delta"),
    "writer": ("parts", "spark"),
    "pack": ("best-fit", "concat", "none"),
    "method": ("best-fit", "concat", "none"),
    "weight_by": ("documents", "tokens"),
    "split": ("train", "validation"),
    "chat": ("auto", "yes", "no"),
}
#: Those of them that need not be given.
_OPTIONAL = ("format", "writer")
#: Parameters that count something, if they are given.
_COUNTS = (
    "max_len",
    "max_document_bytes",
    "num_block",
    "num_partition",
    "num_engine",
    "max_pixels",
    "min_pixels",
    "max_tiles",
)
#: Parameters that are on or off.
_SWITCHES = ("parse_special_tokens", "overwrite", "dedup")


def check_parameters(given: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a value that a parameter of that name does not take; others are not looked at."""
    for name, value in given.items():
        if value is None and name in _OPTIONAL:
            continue
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"`{name}` is {value!r}, it must be one of {', '.join(CHOICES[name])}.")
        if name in _COUNTS and value is not None and (not _is_integer(value) or value < 1):
            raise UserError(f"`{name}` is {value!r}, it must be a positive integer.")
        if name in _COUNTS and value is not None and value > sys.maxsize:
            raise UserError(f"`{name}` is {value!r}, it must be below 2**63, as Spark's integers are.")
        if name in _SWITCHES and not isinstance(value, bool):
            raise UserError(f"`{name}` is {value!r}, it must be True or False.")
        if name == "seed" and not _is_integer(value):
            raise UserError(f"`seed` is {value!r}, it must be an integer.")
        if name == "show" and (value is None or not _is_integer(value) or value < 0):
            raise UserError(f"`show` is {value!r}, it must be a number of rows, 0 for none.")
        if name == "holdout" and not _is_share(value):
            raise UserError(f"`holdout` is {value!r}, it must be a share, from 0 to below 1.")
        if name == "keep" and value is not None and not _are_names(value):
            raise UserError(f'`keep` is {value!r}, it must be a list of different names of columns, as ["url"] is.')
        if name == "weights" and value is not None and not _are_weights(value):
            raise UserError(f'`weights` is {value!r}, it must map names of tables to numbers, as {{"web": 0.7}} does.')


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < 1


def _are_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(weight, Real) and not isinstance(weight, bool)
        for name, weight in value.items()
    )


def _are_names(value: Any) -> bool:
    names = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [None]
    return all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)


def is_table_name(path: object) -> bool:
    """Whether a name is that of a catalog's table, ``schema.table`` or ``catalog.schema.table``: no path has a file of
    this name, it has no slash, and does not end as files with documents do."""
    from fft.corpus.files import kind_of  # not before: --help need not wait for Arrow

    text = str(path)
    return _NAME.fullmatch(text) is not None and not Path(text).exists() and kind_of(Path(text)) is None


def quoted_column(name: str) -> str:
    """A column's name for Spark, by its name alone: ``a.b`` is a column, and no field of ``a``."""
    return "`" + name.replace("`", "``") + "`"
