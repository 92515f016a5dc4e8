"""The token table's contract: what lies beside the parquet files and says what they are.

A table is a folder of parquet files with a column ``input_ids: list<int32>`` (and optionally ``labels``,
``cu_seqlens``, ``doc_ids``). Beside them, in names that Spark ignores:

- ``_fft_manifest.json``: the facts below, written last and atomically. Its presence means: finished.
- ``_fft_writing.json``: present while a job of ours writes. Found without a manifest: unfinished, never read; unless
  it says that an older table stays until a newer one has taken its place. What else is found beside a manifest and such
  a mark is of a job that is at work, or was interrupted, and is nothing.

A folder with neither is foreign: any Spark job's ``df.write.parquet`` is a table, its facts read from footers. A
manifest of very many files names one that lists them, see :mod:`fft.data.file_list`.
Depends on no other package, so that Spark jobs and the trainer share it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from fft.chart import Picture, bars, notebook_table, shortened
from fft.data.file_list import INLINE, FileInfo, is_list_name, pack_list, unpack_list
from fft.errors import UserError
from fft.json_text import json_value
from fft.redaction import redact_all

#: Tables of texts have the first format version, which older releases read; those with images the second; those whose
#: files are listed beside the manifest are written as the third, those of preferences as the fourth.
FORMAT_VERSION, _OF_PAIRS, _LISTED, _OF_IMAGES, _OF_TEXTS = 4, 4, 3, 2, 1
MANIFEST_NAME = "_fft_manifest.json"
WRITING_NAME = "_fft_writing.json"
#: What lies in a table while it is written: our mark, and Spark's own folder.
UNFINISHED = frozenset((WRITING_NAME, "_temporary"))

#: Key of the name of a list of files, which stands for them.
_LIST = "list"
#: Key of a mark; see :func:`replacing`.
REPLACING = "replacing"

#: Files that decide which ids a text gets. Chat templates and the like may change without changing a table.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
#: The same for a tokenizer that is all code and has none of those, such as ByT5's.
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json")


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. ``vocab_size`` counts added tokens: every id is below it."""

    name: str
    sha256: str
    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Facts about a finished table. ``seq_len`` is set when rows are packed to that many tokens at most; ``vision`` are
    the facts of its :class:`fft.images.rules.ImageRules` where rows have images. With ``pairs``, every two documents of
    a row, the first and the second and so on, are a preference: what was chosen and what was rejected."""

    files: tuple[FileInfo, ...]
    rows: int
    tokens: int
    tokenizer: TokenizerInfo | None = None
    seq_len: int | None = None
    seed: int | None = None
    lineage: dict = field(default_factory=dict)
    format_version: int = _OF_TEXTS
    vision: dict | None = None
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.pairs or self.vision is not None:
            object.__setattr__(self, "format_version", _OF_PAIRS if self.pairs else _OF_IMAGES)

    def _repr_html_(self) -> str:
        return Manifests({"": self})._repr_html_()

    def plot(self) -> Picture:
        """Documents by length, and tokens by dataset where there are several."""
        return Manifests({"": self}).plot()

    @property
    def trained_tokens(self) -> int | None:
        """Tokens that a loss counts: those with a label, but never a document's first. None where nobody has counted
        them, as in tables of older releases."""
        counts = self.lineage.get("counts")
        found = counts.get("trained_tokens") if isinstance(counts, dict) else None
        return found if type(found) is int else None

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets of which it counts rows and tokens."""
        counts = self.lineage.get("counts")
        found = counts.get("datasets") if isinstance(counts, dict) else None
        return list(found) if isinstance(found, dict) else []

    @property
    def kept(self) -> tuple[str, ...]:
        """Columns of texts, one a document, that were kept from what it was made of."""
        found = self.lineage.get("kept")
        return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()

    @property
    def untrained_tokens(self) -> int | None:
        """All other tokens, or None likewise."""
        return None if self.trained_tokens is None else self.tokens - self.trained_tokens

    def check_types(self) -> None:
        """Raise :class:`TypeError` where a count is no number: JSON may say anything."""
        numbers = [self.rows, self.tokens, *(n for n in (self.seq_len, self.seed) if n is not None)]
        if any(type(number) is not int for number in numbers):
            raise TypeError("a count is no number")
        if self.tokenizer is not None and type(self.tokenizer.vocab_size) is not int:
            raise TypeError("the size of a vocabulary is no number")

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal tables have equal manifests; without what is secret."""
        return self._json([asdict(file) for file in self.files], self.format_version)

    @cached_property
    def beside(self) -> tuple[str, bytes] | None:
        """Name and content of the list of files that lies beside the manifest, where they are very many."""
        return pack_list(self.files) if len(self.files) > INLINE else None

    def own_json(self) -> str:
        """What the manifest's own file says; what is :attr:`beside` it must be there before."""
        if self.beside is None:
            return self.to_json()
        return self._json({_LIST: self.beside[0], "count": len(self.files)}, max(_LISTED, self.format_version))

    def _json(self, files: Any, format_version: int) -> str:
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "files"}
        facts |= {"files": files, "format_version": format_version, "lineage": redact_all(self.lineage)}
        if self.tokenizer is not None:
            facts["tokenizer"] = asdict(self.tokenizer)
        for name in ("vision", "pairs"):  # which tables of texts have no word of
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str, read: Callable[[str], bytes] | None = None) -> "Manifest":
        """Parse what :meth:`to_json` wrote, or :meth:`own_json`, of which ``read`` gives what lies beside, by name.

        Raises :class:`UserError` naming ``where`` when it is none.
        """
        try:
            raw = json_value(text)
            version = raw["format_version"]
            if version > FORMAT_VERSION:
                raise UserError(
                    f"{where} has format version {version}, this release reads up to {FORMAT_VERSION}: "
                    "upgrade flash-fine-tuning."
                )
            listed = raw["files"]
            if isinstance(listed, dict) and read is not None:
                raw["files"] = _listed(read, listed)
                raw["format_version"] = _OF_TEXTS
            else:
                raw["files"] = tuple(_checked(FileInfo(**f)) for f in listed)
            if raw.get("tokenizer") is not None:
                raw["tokenizer"] = TokenizerInfo(**raw["tokenizer"])
            if not isinstance(raw.get("lineage", {}), dict):
                raise TypeError("lineage is no object")
            if not isinstance(raw.get("vision"), dict | None):
                raise TypeError("vision is no object")
            if type(raw.get("pairs", False)) is not bool:
                raise TypeError("pairs is neither true nor false")
            made = cls(**raw)
            made.check_types()
            return made
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(
                f"{where} is not a manifest ({error!r}): write the table again with --overwrite."
            ) from error


def _checked(file: FileInfo) -> FileInfo:
    """A file's entry; raises :class:`TypeError` for other types than it is to have."""
    if type(file.path) is not str or any(type(n) is not int or n < 0 for n in (file.rows, file.tokens, file.bytes)):
        raise TypeError(f"{file} is no file's entry")
    return file


class Manifests(dict[str, Manifest]):
    """Manifests of tables by their names, as a notebook shows them: a row a table, and what it is mixed from.

    >>> made = Manifests(train=Manifest((), 4, 60, lineage={"counts": {"lengths": {"8": 3, "16": 1}}}))
    >>> made["train"].tokens, made["train"].trained_tokens  # nobody has counted what is trained
    (60, None)
    >>> made.plot().save("lengths.svg")  # doctest: +SKIP
    """

    def plot(self) -> Picture:
        """Of each table, documents by length, and tokens by dataset where there are several."""
        charts = []
        for name, made in self.items():
            counts = made.lineage.get("counts") or {}
            charts.append((f"{name} documents by length".strip(), _histogram(counts)))
            mixture = _mixture(counts)
            charts += [(f"{name} tokens by dataset".strip(), mixture)] if len(mixture) > 1 else []
        return Picture(bars(charts))

    def _repr_html_(self) -> str:
        head, rows = ("table", "made by", "files", "rows", "tokens", "bytes", "trained"), []
        for name, made in self.items():
            size = sum(file.bytes for file in made.files)
            job, trained = str(made.lineage.get("job", "")), or_unknown(made.trained_tokens)
            rows.append((name, job, len(made.files), made.rows, made.tokens, size, trained))
            for own, counts in made.lineage.get("counts", {}).get("datasets", {}).items():
                rows.append(
                    ("", f"from {shortened(own, 60)}", "", counts.get("rows", ""), counts.get("tokens", ""), "", "")
                )
        return notebook_table(rows, head)


def trained_by(manifest: Manifest | None) -> int | None:
    """Tokens of a table that a loss counts, as its manifest says; None where that does not, or there is none."""
    return None if manifest is None else manifest.trained_tokens


def _histogram(counts: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    found = counts.get("lengths") or {}
    return [(f"from {int(least):,} tokens", count, f"{count:,}") for least, count in found.items()]


def _mixture(counts: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    found = counts.get("datasets") or {}
    whole = max(1, sum(own["tokens"] for own in found.values()))
    return [(name, own["tokens"], f"{own['tokens'] / whole:.1%}") for name, own in found.items()]


def or_unknown(count: int | None) -> int | str:
    """A count, or that it is unknown."""
    return "unknown" if count is None else count


def _listed(read: Callable[[str], bytes], named: dict[str, Any]) -> tuple[FileInfo, ...]:
    """The files of a list. Raises :class:`ValueError` for another than is named."""
    if not is_list_name(named[_LIST]):
        raise ValueError(f"{named[_LIST]!r} names no list of files")
    files = unpack_list(read(named[_LIST]))
    if len(files) != named["count"]:
        raise ValueError(f"{named[_LIST]} lists {len(files)} files, not {named['count']}")
    return files


def tokenizer_sha256(directory: str | os.PathLike) -> str:
    """Hash the files of a tokenizer directory that decide its ids (names and bytes, in a fixed order)."""
    digest, folder = hashlib.sha256(), Path(directory)
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for name in names or [name for name in _TOKENIZER_SETTINGS if (folder / name).is_file()]:
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()


def read_manifest(table: str | os.PathLike) -> Manifest | None:
    """Return the manifest of the table at a local path, or None when the table is foreign.

    Raises :class:`UserError` when a job of ours was interrupted while writing the table.
    """
    folder = Path(table)
    paths = (folder / MANIFEST_NAME, folder / WRITING_NAME)
    content, mark = (path.read_bytes() if path.is_file() else None for path in paths)
    found = [name for name in UNFINISHED if (folder / name).exists()]
    return manifest_of(str(folder), content, mark, found, lambda name: (folder / name).read_bytes())


def replacing(mark: bytes | None) -> str | None:
    """Of a mark that says that an older table stays for now: how the names of the newer one's files end. Else None."""
    try:
        facts = json_value(mark) if mark is not None else None
    except ValueError:
        return None
    return facts.get(REPLACING) if isinstance(facts, dict) else None


def manifest_of(
    table: str,
    content: bytes | None,
    mark: bytes | None,
    found: Collection[str],
    read: Callable[[str], bytes],
) -> Manifest | None:
    """As :func:`read_manifest`, of what lies there: the bytes of the manifest and of the mark, if any, which of
    :data:`UNFINISHED` were ``found``, and what ``read`` gives of other files. A mark that says that an older table
    stays for now is none of an unfinished one.

    Raises :class:`UserError` for a table that is unfinished, and for a manifest that is none.
    """
    if content is not None:
        # Bytes that are no text must not stop here: from_json says where they are.
        return Manifest.from_json(content.decode("utf-8", "replace"), f"{table}/{MANIFEST_NAME}", read)
    if set(found) - ({WRITING_NAME} if replacing(mark) is not None else set()):
        raise UserError(f"{table} is unfinished: the job that wrote it was interrupted; run that job again.")
    return None


def in_order(name: str) -> list[str]:
    """The key by which a table's files are sorted: their names, folder by folder."""
    return name.split("/")


def is_hidden(path: PurePath) -> bool:
    """Whether Spark, and so everything here, passes over a file of a table: ``path`` is relative to the table."""
    return any(part.startswith(("_", ".")) for part in path.parts)
