"""Parquet files that Spark's own writer adds to a folder or URL, and the manifest that makes them its table."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyspark.sql import DataFrame

from fft.data.commits import write_list
from fft.data.footer import Footer
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, Manifest
from fft.data.owner import OWNER_NAME
from fft.data.part_files import Part
from fft.data.storage import Storage, reaching
from fft.data.store_owner import OWNERS
from fft.errors import UserError

#: What is there beside the files of a table.
_MARKS = (MANIFEST_NAME, WRITING_NAME, OWNER_NAME, OWNERS)
#: What may lie there.
_OWN = re.compile("|".join((r".*\.parquet", r"\..*\.crc", "_SUCCESS", "_temporary", *map(re.escape, _MARKS))))


@dataclass
class Folder:
    """Parquet files by path or URL. New files come beside older ones, which the manifest in its place then leaves out,
    and which are removed."""

    storage: Storage
    overwrite: bool
    lineage: dict
    older: set[str] = field(default_factory=set)
    made: bool = False

    @property
    def shown(self) -> str:
        """What to call it when talking to the user."""
        return self.storage.name

    def check(self) -> None:
        """Raise :class:`UserError` when a table is there and may not, or cannot, be replaced."""
        with reaching(self.shown):
            there = self.storage.here()
        strangers = sorted(name for name in there if not _OWN.fullmatch(name))
        if strangers:
            raise UserError(
                f"`output` {self.shown} holds {strangers[0]}, which is no part of a table: give another folder."
            )
        files = {name for name in there if name.endswith(".parquet")}
        finished, begun_there = MANIFEST_NAME in there, WRITING_NAME in there
        if finished and not self.overwrite:
            raise UserError(f"`output` {self.shown} exists: give `overwrite=True` to replace it, or another folder.")
        if files and not finished and not begun_there:
            raise UserError(
                f"`output` {self.shown} holds a table without a manifest, which Spark's writer cannot replace in one "
                "step: remove it, or give another folder."
            )
        self.older = {n for n, size in there.items() if size is not None and n not in _MARKS}

    def write(self, rows: DataFrame) -> None:
        """Add the rows as files."""
        self.made = True
        self.storage.make()
        self.storage.write(WRITING_NAME, json.dumps(self.lineage, indent=1, sort_keys=True))
        url = f"file://{self.storage.root}" if self.storage.is_local else self.storage.name
        rows.write.mode("append").parquet(url)

    def parts(self, rows: int, tokens: int) -> list[Part]:
        """The new files, by their footers."""
        with reaching(self.shown):
            there = self.storage.here()
        return footer_parts(
            self.storage, {n: s for n, s in there.items() if n.endswith(".parquet") and n not in self.older}
        )

    def commit(self, manifest: Manifest) -> None:
        """The manifest, then what it leaves out goes."""
        with reaching(self.shown):
            write_list(self.storage, manifest)
            self.storage.write(MANIFEST_NAME, manifest.own_json())
        self.storage.delete([*sorted(self.older), WRITING_NAME])

    def abandon(self) -> None:
        """Remove the new files."""
        if self.made:
            there = self.storage.here()
            kept = {MANIFEST_NAME, OWNER_NAME, *self.older}
            self.storage.delete(n for n, size in there.items() if size is not None and n not in kept)
            self.storage.delete_empty()


def footer_parts(storage: Storage, sizes: Mapping[str, int | None]) -> list[Part]:
    """Parquet files in name order as parts, counted by their footers; those without rows too, without a name."""
    parts = []
    for number, name in enumerate(sorted(sizes)):
        groups = Footer.read(storage.path(name), storage.filesystem).row_groups()
        rows, tokens = sum(group.rows for group in groups), sum(group.tokens for group in groups)
        parts.append(Part(number, name if rows else "", rows, tokens, sizes[name] or 0, {}))
    return parts
