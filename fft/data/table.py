"""Open a token table: which files, how many rows and tokens each row group holds. Footers only, no scan."""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from fft.data.arrow_lists import list_values
from fft.data.asking import asking, of_storage
from fft.data.delta import read_snapshot, split_name
from fft.data.footer import Each, Footer, RowGroup, each_of, row_groups_of
from fft.data.known import GRIDS, IGNORE, IMAGES, LISTS, MASK, LeftOut, file_class, partition_of, unread_columns
from fft.data.lakes import check_loose, check_not_inside
from fft.data.lengths import ends_of_documents
from fft.data.listing import Listing
from fft.data.manifest import MANIFEST_NAME, Manifest, is_hidden
from fft.data.row_images import RowImages
from fft.data.storage import Storage, check_names_utf8, printable
from fft.data.table_files import check_against_manifest, parquet_files, untagged
from fft.errors import UserError, one_line
from fft.images.rules import FAMILIES, ImageRules


@dataclass(frozen=True)
class Rows:
    """A decoded row group: row ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``.

    ``labels`` are aligned with ``input_ids``; they are None where the table has none, or they were not asked for;
    ``input_ids`` that were not asked for are empty. The documents of row ``i`` end at
    ``ends[end_offsets[i]:end_offsets[i + 1]]``, counted from the row's begin; both are None where every row is one
    document. ``images`` is None where there are none, or they were not asked for; ``reference`` has what a reference
    model says of each document, and ``datasets`` which dataset it is of, a number, where that is known.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None = None
    ends: np.ndarray | None = None
    end_offsets: np.ndarray | None = None
    images: RowImages | None = None
    reference: np.ndarray | None = None
    datasets: np.ndarray | None = None

    def reference_of(self, row: int) -> np.ndarray:
        """What a reference model says of each document of a row, float32; 0 where that is not known."""
        first, last = (0, 0) if self.end_offsets is None else self.end_offsets[row : row + 2]
        return np.zeros(last - first, np.float32) if self.reference is None else self.reference[first:last]

    def document_ends(self, row: int, start: int, stop: int) -> list[int]:
        """Where documents end in tokens [start, stop) of a row, counted from ``start``; the last is ``stop``'s."""
        if self.ends is None or self.end_offsets is None:
            return [stop - start]
        ends = self.ends[self.end_offsets[row] : self.end_offsets[row + 1]]
        if start == 0 and ends[-1] == stop:
            return ends.tolist()
        first, last = ends.searchsorted((start, stop), side="right")
        inside = (ends[first:last] - start).tolist()
        return inside if inside and inside[-1] == stop - start else [*inside, stop - start]


@dataclass(frozen=True)
class Table:
    """A token table at a fixed state: its files in name order, their row groups, and the manifest if it has one.

    ``columns`` are those that every file has; ``unread`` counts what is not read. Paths of row groups are those of
    ``filesystem``.
    """

    path: str
    row_groups: tuple[RowGroup, ...]
    columns: frozenset[str]
    manifest: Manifest | None
    version: int | None
    storage: Storage
    unread: LeftOut

    @classmethod
    def open(cls, path: str | os.PathLike[str], each: Each = each_of) -> "Table":
        """Read the footers of a folder of parquet files, a file, or a Delta table (``path@v12`` pins a version).

        Either may be one of an object store, by URL. ``each`` reads the footers.
        Raises :class:`UserError` when there is no table, it is unfinished, empty, lacks ``input_ids``, has columns of
        another type than the contract's, mixes files with and without one of them, no longer is what its manifest
        says, or is a folder of several tables.
        """
        name, version = split_name(str(path).rstrip("/") or "/")
        storage = Storage.at(name)
        listing = storage.list()
        check_not_inside(storage)
        if version is not None or "_delta_log" in listing.folders:
            snapshot = read_snapshot(storage, version, listing)
            names, manifest, version = snapshot.names, snapshot.manifest, snapshot.version
            partitions = snapshot.partitions
        else:
            names, manifest = parquet_files(storage, listing)
            partitions = {name: partition_of(name) for name in names}
            if manifest is None:
                check_loose(storage, listing)
        if manifest is not None:
            check_against_manifest(storage, listing, manifest)
        root, files = storage.name, [storage.path(name) for name in names]
        check_names_utf8(files)
        if not files:
            raise UserError(f"{root} holds no parquet files: write a token table there with spark_jobs/tokenize.py.")
        groups: list[RowGroup] = []
        columns: frozenset[str] | None = None
        unread = _unread_files(listing)
        for partition in partitions.values():
            for column in partition:
                unread.add(f"partition column {printable(column)}")
        answers = each(partial(row_groups_of, filesystem=storage.filesystem), files)
        for file, (there, row_groups) in zip(files, answers, strict=True):
            found = frozenset(there)
            for column in unread_columns(there):
                unread.add(f"column {column}")
            columns = found if columns is None else columns
            for column in (*LISTS, IMAGES, GRIDS):
                if (column in columns) != (column in found):
                    have, lack = (file, files[0]) if column in found else (files[0], file)
                    raise UserError(
                        f"{have} has a column {column}, {lack} has none: keep tables of different kinds in folders of "
                        "their own."
                    )
            columns &= found
            groups.extend(group for group in row_groups if group.tokens > 0)
        if not groups:
            raise UserError(f"{root} holds no tokens: its {len(files)} parquet file(s) are empty.")
        return cls(root, tuple(groups), columns or frozenset(), manifest, version, storage, unread)

    @property
    def filesystem(self) -> FileSystem:
        """Where its files lie."""
        return self.storage.filesystem

    @property
    def source(self) -> str:
        """The path, with the version where there is one: what to open to find the same content again."""
        return self.path if self.version is None else f"{self.path}@v{self.version}"

    @property
    def locations(self) -> list[str]:
        """What names the file of each row group on every machine: a path, or a URL."""
        root = self.storage.root
        return [
            self.storage.location_of(group.path.removeprefix(root).removeprefix("/"))
            if group.path.startswith(root)
            else group.path
            for group in self.row_groups
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of which files there are and how many rows, tokens and bytes their row groups hold.

        A table that an equal one has replaced keeps it, though the new files have another job's id in their names.
        """
        names = (os.path.relpath(g.path, self.storage.root) for g in self.row_groups)
        names = names if self.version is not None else map(untagged, names)
        facts = [
            (n, g.index, g.rows, g.tokens, g.bytes, *([g.image_bytes] if self.has_images else []))
            for n, g in zip(names, self.row_groups, strict=True)
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def origin(self) -> dict[str, Any]:
        """What a table or a run that is made of it says of it, and of what it was made of itself."""
        lineage = self.manifest.lineage if self.manifest else {}
        # Older tables have the names of their inputs alone.
        made_from = lineage.get("made_from", [{"input": name} for name in lineage.get("inputs", [])])
        return {"input": self.source, "fingerprint": self.fingerprint, "made_from": made_from}

    @property
    def has_images(self) -> bool:
        """Whether its rows have images, or columns for some."""
        return IMAGES in self.columns

    @property
    def has_pairs(self) -> bool:
        """Whether its rows are preferences, see :mod:`fft.data.pairs`."""
        return self.manifest is not None and self.manifest.pairs

    @cached_property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(g.rows for g in self.row_groups)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all files."""
        return sum(g.tokens for g in self.row_groups)

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of images in all files."""
        return sum(g.image_bytes for g in self.row_groups)

    @cached_property
    def rules(self) -> ImageRules | None:
        """What its manifest says of its images; None where it has none, or no manifest. Raises :class:`UserError` when
        that is not understood."""
        vision = self.manifest.vision if self.manifest and self.has_images else None
        return None if vision is None else ImageRules.of(vision, f"{self.path}/{MANIFEST_NAME}")

    def check_trainable(self, takes_images: bool = False) -> None:
        """Raise :class:`UserError` where footers and manifest say that rows have images, unless a model takes them, are
        padded, or hold nothing to learn."""
        if self.has_images and not takes_images:
            raise UserError(
                f"{self.path} has images, and the model takes none: give a model of type {', '.join(FAMILIES)}, or a "
                "table of texts, which spark_jobs/tokenize.py makes without --image_path."
            )
        padded = next((group for group in self.row_groups if group.padded), None)
        if padded is not None:
            raise _padding_error(str(padded))
        if not any(group.trained for group in self.row_groups):
            raise UserError(
                f"{self.path}: nothing is trained on, since all labels are {IGNORE}: give documents with labels of "
                "0 or more, or drop the column."
            )
        lengths = self.manifest.lineage.get("counts", {}).get("lengths") if self.manifest else None
        if set(lengths) == {"1"} if lengths else self.tokens == self.rows and "cu_seqlens" not in self.columns:
            raise UserError(
                f"{self.path}: nothing is trained on, since every document is one token, which predicts nothing: give "
                "longer ones."
            )

    def read(self, group: int, vocab_size: int | None = None, ids: bool = True, labels: bool = True) -> Rows:
        """Decode and check one row group, without images: :meth:`load`, then :meth:`check`."""
        return self.check(group, self.load(group, ids, labels), vocab_size)

    def load(self, group: int, ids: bool = True, labels: bool = True, more: Collection[str] = ()) -> pa.Table:
        """Decode one row group: no other columns than are asked for, but ids, where there are no labels. ``more`` are
        columns such as :data:`GRIDS` and :data:`IMAGES` that are wanted, if the table has them.

        Nearly all of it happens outside Python, so that other threads go on. Raises :class:`UserError` naming file
        and row group when it cannot be read, or no longer is what it was when the table was opened.
        """
        where = self.row_groups[group]
        labels = labels and "labels" in self.columns
        unused = {"input_ids": labels and not ids, "labels": not labels}
        wanted = [c for c in (*LISTS, *more) if c in self.columns and not unused.get(c)]
        wanted += [MASK] if where.padded is not False else []

        def read() -> pa.Table | None:
            # Unbuffered reads of one row group: the defaults grow to the whole file.
            with pq.ParquetFile(where.path, pre_buffer=False, buffer_size=1 << 20, filesystem=self.filesystem) as file:
                same = [where] == Footer(where.path, file.metadata).row_groups([where.index])
                return file.read_row_group(where.index, columns=wanted, use_threads=False) if same else None

        try:
            loaded = asking(read)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            remedy = "see what its storage says" if of_storage(error) else "write the table again"
            raise UserError(f"{where} cannot be read ({one_line(error)}): {remedy}.") from error
        if loaded is None:
            raise UserError(f"{where} was changed after the run had read its footer: give the run a table that stays.")
        return loaded

    def check(
        self, group: int, loaded: pa.Table, vocab_size: int | None = None, rules: ImageRules | None = None
    ) -> Rows:
        """A decoded row group as arrays; with ``rules``, which need ids and grids, also its images.

        Raises :class:`UserError` naming file and row group when it is not valid.
        """
        where = self.row_groups[group]
        name = str(where)
        lists = {column: list_values(loaded, column, name) for column in LISTS if column in loaded.column_names}
        values, offsets = next(iter(lists.values()))
        if len(values) < where.tokens:
            raise UserError(
                f"{name} holds {where.tokens - len(values)} empty row(s), which parquet footers count as tokens: "
                "drop rows whose input_ids are empty."
            )
        input_ids = lists["input_ids"][0] if "input_ids" in lists else np.empty(0, np.int32)
        targets = lists["labels"][0] if "labels" in lists else None
        if vocab_size is not None:
            _check_ids(input_ids, vocab_size, f"{name} holds token id")
        lengths = np.diff(offsets)
        if MASK in loaded.column_names:
            _check_mask(loaded.select([MASK]), lengths, name)
        packed_to = self.manifest and self.manifest.seq_len
        if packed_to and lengths.max(initial=0) > packed_to:
            raise UserError(
                f"{name}, row {lengths.argmax()} has {lengths.max()} tokens, the table's manifest says that rows are "
                f"packed to {packed_to}: write the table again."
            )
        if targets is not None:
            if not np.array_equal(offsets, lists["labels"][1]):
                raise UserError(f"{name}: labels and input_ids differ in length: write the table again.")
            if vocab_size is not None:
                _check_ids(targets[targets != IGNORE], vocab_size, f"{name} holds label")
        ends = ends_of_documents(*lists["cu_seqlens"], lengths, name) if "cu_seqlens" in lists else (None, None)
        rows = Rows(input_ids, offsets, targets, *ends)
        return rows if rules is None else replace(rows, images=_images(rows, loaded, name, rules))


def _images(rows: Rows, loaded: pa.Table, name: str, rules: ImageRules) -> RowImages | None:
    ends = rows.offsets[1:]
    if rows.ends is not None and rows.end_offsets is not None:
        ends = rows.ends + np.repeat(rows.offsets[:-1], np.diff(rows.end_offsets))
    return RowImages.read(loaded, name, rows.input_ids, rows.offsets, ends, rules)


def _check_mask(mask: pa.Table, lengths: np.ndarray, name: str) -> None:
    """An attention mask of which the footer did not say that it is all ones, and as long as the ids."""
    values, offsets = list_values(mask.cast(pa.schema([(MASK, pa.list_(pa.int64()))])), MASK, name)
    if not np.array_equal(np.diff(offsets), lengths):
        raise UserError(f"{name}: {MASK} and input_ids differ in length: write the table again.")
    if (values != 1).any():
        raise _padding_error(name)


def _padding_error(where: str) -> UserError:
    return UserError(
        f"{where}: {MASK} says that some tokens are padding: write the table again with spark_jobs/repartition.py, "
        "which leaves them out."
    )


def _check_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{what} {low if low < 0 else high}, outside the model's vocabulary of {vocab_size}: tokenize with the "
            "model's own tokenizer."
        )


def _unread_files(listing: Listing) -> LeftOut:
    """Files of a table that are not read, by the ends of their names."""
    unread = LeftOut()
    for name in listing.sizes.keys() - {"", *listing.repeated.values()}:
        path = PurePosixPath(name)
        if path.suffix != ".parquet" and not is_hidden(path):
            unread.add(file_class(path), listing.sizes[name])
    return unread
