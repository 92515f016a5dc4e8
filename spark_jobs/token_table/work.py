"""A name for all that decides what is in a job's parts: the same work has the same, and only that."""

import hashlib
import importlib.metadata
import json
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pyarrow import fs

from fft.data.storage import Storage, is_url, reaching
from fft.package_files import modules_of
from spark_jobs.token_table.engine_table import EngineTable
from spark_jobs.token_table.output import Output
from spark_jobs.token_table.read import Dataset
from spark_jobs.token_table.spark_output import SparkOutput

#: What writes files and makes ids beside our own code.
_LIBRARIES = ("pyarrow", "tokenizers", "fastokens", "transformers", "pillow")
#: Files of one folder from which on it is listed, instead of each being asked for.
_LISTED = 20


def work_of(job: str, *facts: Any) -> str:
    """The name of a job's work by the ``facts`` that decide it, and by the code that does it."""
    told = json.dumps([job, _code(), facts], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def work_on(job: str, output: Output | SparkOutput, datasets: Sequence[Dataset], *facts: Any) -> str:
    """The same of a job on token tables; "", no name, where nobody can tell whether they have changed."""
    told = [
        (dataset.name, dataset.kept, dataset.table.origin, states_of(list(dict.fromkeys(dataset.table.locations))))
        for dataset in datasets
        if not isinstance(dataset.table, EngineTable)
    ]
    if isinstance(output, SparkOutput) or len(told) < len(datasets):
        return ""
    return work_of(job, output.table_format, list(output.names), told, *facts)


def states_of(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Of each file, by path or URL: its name, bytes, and when it was changed last, in nanoseconds.

    Raises :class:`UserError` where a store does not tell.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[posixpath.dirname(path)].append(path)
    found = {}
    for folder, own in folders.items():
        with reaching(folder):
            for path, info in zip(own, _infos(folder, own), strict=True):
                found[path] = (path, info.size or 0, info.mtime_ns or 0)
    return [found[path] for path in paths]


def _infos(folder: str, paths: Sequence[str]) -> list[fs.FileInfo]:
    if not is_url(folder) or len(paths) < _LISTED:
        storages = [Storage.at(path) for path in paths]
        return storages[0].filesystem.get_file_info([storage.root for storage in storages])
    place = Storage.at(folder)
    listed = {info.base_name: info for info in place.filesystem.get_file_info(fs.FileSelector(place.root))}
    return [listed.get(posixpath.basename(path)) or place.info(posixpath.basename(path)) for path in paths]


def states_in(folder: str) -> list[tuple[str, int, int]]:
    """The same of all files in a folder, at whatever depth."""
    place = Storage.at(folder)
    return states_of([place.location_of(name) for name in sorted(place.list().sizes)])


@lru_cache
def _code() -> str:
    """What this package is, by the text of its modules, and what it stands on."""
    digest = hashlib.sha256()
    for package in ("fft", "spark_jobs"):
        for name, module in sorted(modules_of(package)):
            digest.update(name.encode() + module.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library} {importlib.metadata.version(library)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()
