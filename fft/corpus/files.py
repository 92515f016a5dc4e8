"""Raw inputs: which files there are, of which kind, and how they are cut into parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fft.corpus.readers import COMPRESSIONS, row_group_sizes, schema_of
from fft.corpus.splits import Span, chunk_size, cut_text
from fft.data.delta import is_delta, read_snapshot, split_version
from fft.data.manifest import is_hidden
from fft.data.storage import Storage
from fft.errors import UserError
from fft.text.records import RecordEncoder

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


#: Bytes of text in a byte of its compressed form, roughly: to deal files to parts.
_EXPANSION = 4


@dataclass(frozen=True)
class Source:
    """Files of one kind under one input path."""

    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.files)


def kind_of(path: Path) -> str | None:
    """Kind by suffix, with a compression's suffix taken off; None when unknown."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return KINDS.get(os.path.splitext(name)[1])


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """List the files below the inputs. Raises :class:`UserError` for what is missing, empty or of no known kind."""
    sources = []
    for path in inputs:
        folder, version = split_version(path)
        if version is not None or is_delta(folder):
            table = Storage.at(folder)
            snapshot = read_snapshot(table, version)
            files = tuple(Path(table.path(name)) for name in snapshot.names)
            sources.append(Source(Path(f"{folder}@v{snapshot.version}"), "parquet", files))
            continue
        if not path.exists():
            raise UserError(f"`inputs` {path} does not exist: give a file or a folder of JSON lines, parquet or text.")
        if path.is_file():
            files = [path]
            if kind_of(path) is None:
                raise UserError(f"`inputs` {path} is of no known kind: its name must end in {_known()}.")
        else:
            files = sorted(
                p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path)) and kind_of(p)
            )
            if not files:
                raise UserError(f"`inputs` {path} holds no documents: no file there ends in {_known()}.")
        for kind in dict.fromkeys(filter(None, map(kind_of, files))):
            sources.append(Source(path, kind, tuple(file for file in files if kind_of(file) == kind)))
    return sources


def _known() -> str:
    return f"{', '.join(KINDS)} (and {', '.join(COMPRESSIONS)} of the text kinds)"


def spans_of(sources: Sequence[Source], record_encoder: RecordEncoder[Any]) -> list[Span]:
    """The inputs cut into spans that can be read on their own. Raises :class:`UserError` for unreadable parquet."""
    chunk = chunk_size(sum(source.bytes for source in sources))
    spans = []
    for source in sources:
        name = str(source.path)
        for file in source.files:
            path, size = str(file.absolute()), file.stat().st_size
            if source.kind == "parquet":
                record_encoder.columns(schema_of(path), name)
                spans += [Span(name, "parquet", path, i, i + 1, s) for i, s in enumerate(row_group_sizes(path))]
            elif file.suffix.lower() in COMPRESSIONS:
                spans.append(Span(name, source.kind, path, 0, 0, size * _EXPANSION))
            else:
                spans += cut_text(name, source.kind, path, size, chunk)
    return spans
