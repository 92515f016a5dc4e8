"""Tables as inputs, each under a name: one that was given, or its folder's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pyspark.sql import SparkSession

from fft.errors import UserError
from spark_jobs.parameters import is_table_name
from spark_jobs.runtime.many_files import EachByTasks
from spark_jobs.token_table.output import place_at
from spark_jobs.token_table.read import Dataset, find_tables, open_datasets, open_named, refuse_own

#: Tables by path or name of a catalog, perhaps as ``NAME=TABLE``; or by the names that they are to have.
Inputs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
_NAME = re.compile(r"[\w.-]+")
_NAMED = re.compile(rf"({_NAME.pattern})=(.+)")


def open_inputs(
    inputs: Inputs, session: Callable[[], SparkSession], keep: Sequence[str] | None = None
) -> list[Dataset]:
    """Tables of folders and of catalogs, with those of the columns to ``keep`` that each has.

    Raises :class:`UserError` for what is no table, for a table or a name that is given twice, and for a column that no
    table has or that is no other than the jobs' own.
    """
    files: list[tuple[str, str]] = []
    named: list[tuple[str, str]] = []
    for name, path in _pairs(inputs):
        if is_table_name(path):
            named.append((name, str(path)))
            continue
        tables = find_tables(place_at(path, "inputs"), "inputs")
        if name and len(tables) > 1:
            raise UserError(f"`inputs` {name}={path} holds {len(tables)} tables: give each a name of its own, or none.")
        files += [(name, table) for table in tables]
    found = open_datasets([path for _, path in files], EachByTasks(session), [name for name, _ in files])
    if named:
        opened = open_named(session(), [path for _, path in named], found)
        found += [replace(d, name=name) if name else d for d, (name, _) in zip(opened, named, strict=True)]
    names = [dataset.name for dataset in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"`inputs` has two tables called {repeated}: give one another name, as in NAME=TABLE.")
    _check_keep(found, keep or ())
    return [replace(d, kept=tuple(column for column in keep or () if column in d.table.columns)) for d in found]


def _pairs(inputs: Inputs) -> list[tuple[str, str | Path]]:
    """A name, "" for none, and a table for each input. A path that exists is no name and a table."""
    if isinstance(inputs, Mapping):
        wrong = next((name for name in inputs if not _NAME.fullmatch(str(name))), None)
        if wrong is not None:
            raise UserError(f"`inputs` names a table {wrong!r}: a name has letters, digits and . _ - alone.")
        return list(inputs.items())
    pairs: list[tuple[str, str | Path]] = []
    for path in [inputs] if isinstance(inputs, str | Path) else inputs:
        found = None if isinstance(path, Path) or Path(path).exists() else _NAMED.fullmatch(path)
        pairs.append((found[1], found[2]) if found else ("", path))
    return pairs


def _check_keep(datasets: Sequence[Dataset], keep: Sequence[str]) -> None:
    refuse_own(keep)
    there = frozenset().union(*(dataset.table.columns for dataset in datasets))
    missing = [name for name in keep if name not in there]
    if missing:
        raise UserError(f"`keep` names {missing[0]}, which no table has: they have {', '.join(sorted(there))}.")
