"""What of an input is understood: kinds of files, columns of a token table. docs/inputs.md explains these lists.

All else is refused by name, or counted and told in the job's summary. The keys of a record are in
:mod:`fft.text.records` and :mod:`fft.text.messages`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote

from fft.data.storage import printable

#: How documents lie in a file, by the end of its name.
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
#: May follow the end of a file of JSON lines or of text.
COMPRESSIONS = (".gz", ".zst", ".bz2")

#: What lies in the folder of a table whose files are not all of its newest version: what makes it one, and its name.
LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
#: An Iceberg table has files of this folder and end of name.
ICEBERG = ("metadata", ".metadata.json")

#: Columns of a token table that are read; all are lists of integers.
LISTS = ("input_ids", "labels", "cu_seqlens")
#: Columns of a row's images, which have both or neither: the bytes of files as they were, a list of binary values; and
#: their grids of patches, a list of integers, three an image, in the order in which they stand in the row.
IMAGES, GRIDS = "images", "image_grids"
#: The column of documents' ids: a list a row or, where a row is a document, a string or an integer.
DOC_IDS = "doc_ids"
#: The column that says which dataset each document is of, by its name: in the form of :data:`DOC_IDS`.
DATASET = "dataset"
#: The column that says with 0 which tokens are padding.
MASK = "attention_mask"
#: The label of tokens that are not trained on.
IGNORE = -100

#: How Spark calls the folder of rows whose partition column is null.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_TRAINED = "make labels of it, -100 where a token is not trained on, and drop it"
_BOUNDS = "make cu_seqlens of it, the documents' boundaries, and drop it"
#: Columns that say of tokens what only the columns above may say, and what to do about them.
REFUSED = {
    **dict.fromkeys(
        ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks", "prompt_mask", "label_mask"), _TRAINED
    ),
    **dict.fromkeys(("position_ids", "seq_lengths", "seq_lens", "document_ids", "segment_ids"), _BOUNDS),
    "pixel_values": "images are read as files, make the table with spark_jobs/tokenize.py --image_path",
}


def file_class(path: PurePosixPath) -> str:
    """What a file that is not read is counted as, by the end of its name: ".csv files", ".csv.gz files"."""
    ends = [suffix.lower() for suffix in path.suffixes[-2:]]
    if ends and ends[-1] not in COMPRESSIONS and ends[0] not in KINDS:
        ends = ends[-1:]
    return f"{printable(''.join(ends))} files" if ends else "files without an ending"


_READ = (*LISTS, DOC_IDS, DATASET, MASK, IMAGES, GRIDS)


def unread_columns(names: list[str] | tuple[str, ...], read: tuple[str, ...] = _READ) -> list[str]:
    """Of a table's columns those that nothing here reads."""
    return [name for name in names if name not in read]


def partition_of(name: str) -> dict[str, str | None]:
    """Columns whose value stands in the name of a folder, as Spark and Hive write them: ``lang=en/part-0.parquet``."""
    pairs = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
    return {unquote(key): None if value == _NULL_PARTITION else unquote(value) for key, _, value in pairs}


@dataclass
class LeftOut:
    """How many ``files`` something concerns that is not read, by its class: ".csv files", "column url", and so on.

    ``bytes`` has what the files hold that are left out as a whole.
    """

    files: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, size: int | None = None) -> None:
        """Count a file; with a ``size`` in bytes, all of it is left out."""
        self.files[what] += 1
        if size is not None:
            self.bytes[what] += size

    def without(self, known: Iterable[str]) -> "LeftOut":
        """The same but for what is ``known`` by now."""
        gone = set(known)
        return LeftOut(*(Counter({w: n for w, n in own.items() if w not in gone}) for own in (self.files, self.bytes)))

    def facts(self) -> dict[str, dict[str, dict[str, int]]]:
        """What a manifest's lineage says of it, under ``not_read``; nothing if all was read."""
        sized = {what: {"bytes": self.bytes[what]} for what in self.bytes}
        classes = {what: {"files": count, **sized.get(what, {})} for what, count in self.files.most_common()}
        return {"not_read": classes} if classes else {}

    def notes(self, of: str = "") -> list[str]:
        """A line for the user, none if all was read; ``of`` names the input."""
        told = [
            f"{count:,} {what} ({self.bytes[what]:,} bytes)" if what in self.bytes else f"{what} ({count:,} files)"
            for what, count in self.files.most_common()
        ]
        return [f"not read{of and f' of {of}'}: {', '.join(told)}"] if told else []
