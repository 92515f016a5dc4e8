"""Token tables that the engine reads: those of a catalog."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.console import say
from fft.data.known import IMAGES, LeftOut, unread_columns
from fft.data.manifest import MANIFEST_NAME, Manifest
from fft.errors import UserError
from spark_jobs.token_table.catalog import PROPERTY, describe_table, of_property, quoted, table_storage


@dataclass(frozen=True)
class EngineTable:
    """A token table behind a name of the engine's, with the facts that :class:`fft.data.table.Table` has of files."""

    path: str
    frame: DataFrame
    columns: frozenset[str]
    rows: int
    tokens: int
    image_bytes: int
    manifest: Manifest | None
    unread: LeftOut
    version: int | None = None
    row_groups: tuple = ()

    @classmethod
    def open(cls, spark: SparkSession, name: str) -> "EngineTable":
        """Raises :class:`UserError` for what is no token table."""
        try:
            frame = spark.table(name)
            columns = frame.columns  # what is not there is met here
        except Exception as error:  # classic Spark and Connect raise their own
            raise UserError(
                f"`inputs` {name} is no existing path, and no table of Spark's: {str(error).splitlines()[0]}"
            ) from error
        if "input_ids" not in columns:
            raise UserError(
                f"`inputs` {name} has no column input_ids (it has {', '.join(columns)}): make a token table of it with "
                "spark_jobs/tokenize.py."
            )
        unread = LeftOut()
        for column in unread_columns(columns):
            unread.add(f"column {column}")
        rows, tokens, image_bytes = _count(frame, IMAGES in columns)
        if not tokens:
            raise UserError(f"`inputs` {name} holds no tokens: its {rows} rows are empty.")
        manifest = catalog_manifest(spark, name)
        if manifest is not None and (manifest.rows, manifest.tokens) != (rows, tokens):
            say(
                f"note: {name} has {rows:,} rows, its manifest says {manifest.rows:,}: it was changed since, and is "
                "read as a table that has none"
            )
            manifest = None
        return cls(name, frame, frozenset(columns), rows, tokens, image_bytes, manifest, unread)

    @property
    def origin(self) -> dict[str, Any]:
        """What is made of it says this of it."""
        lineage = self.manifest.lineage if self.manifest else {}
        made_from = lineage.get("made_from", [])
        return {"input": self.path, "rows": self.rows, "tokens": self.tokens, "made_from": made_from}

    @property
    def has_images(self) -> bool:
        """Whether its rows have images, or columns for some."""
        return IMAGES in self.columns


def _count(frame: DataFrame, images: bool) -> tuple[int, int, int]:
    size = F.greatest(F.coalesce(F.size("input_ids"), F.lit(0)), F.lit(0)).cast("long")
    held = F.expr(f"aggregate({IMAGES}, 0L, (sum, image) -> sum + length(image))") if images else F.lit(0)
    rows, tokens, image_bytes = frame.agg(F.count("*"), F.sum(size), F.sum(held)).collect()[0]
    return rows, tokens or 0, image_bytes or 0


def catalog_manifest(spark: SparkSession, name: str) -> Manifest | None:
    """The manifest of a table of a catalog, its property or beside its files, if it has one. Raises :class:`UserError`
    for one that is none."""
    try:
        rows = spark.sql(f"SHOW TBLPROPERTIES {quoted(name)}").collect()
    except Exception:  # an engine without them, as Sail, or a catalog that does not show them
        rows = []
    text = next((row[1] for row in rows if row[0] == PROPERTY), None)
    if text is not None:
        return of_property(text, f"the property {PROPERTY} of {name}")
    location = describe_table(spark, name).get("Location")
    storage = None if location is None else table_storage(location)
    if storage is None or not storage.exists(MANIFEST_NAME):
        return None
    text = storage.read(MANIFEST_NAME).decode("utf-8", "replace")
    return Manifest.from_json(text, storage.shown(MANIFEST_NAME), storage.read)


def distinct_names(tables: Sequence[str], taken: Sequence[str]) -> list[str]:
    """A name for each table: its last part, or the whole where that is another's."""
    last = [table.rpartition(".")[2] for table in tables]
    return [table if last.count(own) > 1 or own in taken else own for table, own in zip(tables, last, strict=True)]
