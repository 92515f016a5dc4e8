"""A corpus that every machine has: the sources of the running Python's standard library, as JSON lines."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fft.errors import UserError
from fft.files import atomic_file

#: Folders below the standard library that are somebody else's or no sources.
_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class CorpusSummary:
    """What :func:`write_corpus` wrote: documents, UTF-8 bytes of their text, and files it could not decode."""

    documents: int
    bytes: int
    undecodable: int


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[Path]:
    """All ``.py`` files below ``root`` in the order of their relative paths, installed packages left out."""
    found = (p for p in root.rglob("*.py") if not _FOREIGN.intersection(p.relative_to(root).parts))
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def write_corpus(root: Path, output: Path) -> CorpusSummary:
    """Write every decodable, non-blank source file below ``root`` as a line ``{"id": path, "text": text}``.

    ``output`` appears whole or not at all. Raises :class:`UserError` when there are no sources.
    """
    documents = size = undecodable = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as aside:
        with open(aside, "w", encoding="utf-8") as stream:
            for path in source_files(root):
                try:
                    text = path.read_bytes().decode("utf-8")
                except UnicodeDecodeError:  # the library's own tests of other encodings
                    undecodable += 1
                    continue
                if not text.strip():
                    continue
                record = {"id": path.relative_to(root).as_posix(), "text": text}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                documents, size = documents + 1, size + len(text.encode())
        if not documents:
            raise UserError(
                f"{root} holds no Python sources to learn from: this Python came without its library's .py files; "
                "run with another one (make quickstart PYTHON=/path/to/python3)."
            )
    return CorpusSummary(documents, size, undecodable)


def read_texts(corpus: Path) -> Iterator[str]:
    """The texts of a corpus, one after the other."""
    with open(corpus, encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]
