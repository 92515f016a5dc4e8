"""Tables of a catalog: what is known of one, and how Spark's own writer makes one, or a new version."""

import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyarrow import fs
from pyspark.errors import AnalysisException, UnsupportedOperationException
from pyspark.sql import DataFrame, SparkSession

from fft.console import say
from fft.data.commits import write_list
from fft.data.manifest import MANIFEST_NAME, Manifest
from fft.data.part_files import Part
from fft.data.storage import Storage, reaching
from fft.errors import UserError, one_line
from spark_jobs.parameters import is_table_name
from spark_jobs.runtime.session import lacking_connector
from spark_jobs.token_table.spark_folder import footer_parts

#: The property of a table that holds its manifest.
PROPERTY = "fft_manifest"
#: How Spark calls kinds of tables that are files and nothing else: replacing one is not a single step of its.
_FILES = ("parquet", "orc", "csv", "json", "text", "avro", "hive")
_UNREACHED = (
    "its manifest is the table's property fft_manifest; for the trainer, write rows of it to a folder or URL, with "
    "spark_jobs/repartition.py"
)


def as_property(manifest: Manifest) -> str:
    """A manifest as a table's property: compressed, in hexadecimal digits, since Spark hides properties in which
    ``token`` stands, and catalogs limit their length."""
    return zlib.compress(manifest.to_json().encode(), 9).hex()


def of_property(text: str, where: str) -> Manifest:
    """Inverse of :func:`as_property`. Raises :class:`UserError` naming ``where`` for what is none."""
    try:
        content = zlib.decompress(bytes.fromhex(text)).decode()
    except (ValueError, zlib.error) as error:
        raise UserError(f"{where} is no manifest ({one_line(error)}): write the table again.") from error
    return Manifest.from_json(content, where)


def quoted(name: str) -> str:
    """A table's name for SQL, where parts of it may be words of the language."""
    return ".".join(f"`{part}`" for part in name.split("."))


def describe_table(spark: SparkSession, name: str) -> dict[str, str]:
    """What a catalog says of a table in general: "Type", "Provider", "Location" and the like."""
    rows = spark.sql(f"DESCRIBE TABLE EXTENDED {quoted(name)}").collect()
    at = next((i for i, row in enumerate(rows) if str(row[0]).startswith("# Detailed")), len(rows))
    return {str(row[0]): str(row[1]) for row in rows[at:]}


def table_storage(location: str) -> Storage | None:
    """Where a table's files are, as this machine reaches them; None where it does not."""
    try:
        storage = Storage.at(re.sub(r"^file:(//)?(?=/)", "", location))
        with reaching(location):
            there = storage.info().type == fs.FileType.Directory
    except UserError:
        return None
    return storage if there else None


@dataclass
class Catalogued:
    """A table of a catalog. One of files alone is written under a name of its own, and takes the older one's place by
    that name; of Delta, Iceberg and the like, a new version is."""

    session: Callable[[], SparkSession]
    name: str
    table_format: str | None
    overwrite: bool
    there: bool = False
    staged: str = ""
    wrote: bool = False

    @property
    def shown(self) -> str:
        """What to call it when talking to the user."""
        return self.name

    def check(self) -> None:
        """Raise :class:`UserError` when a table is there and may not, or cannot, be replaced."""
        spark = self.session()
        with catalog_errors(self.name):
            self.there = spark.catalog.tableExists(self.name)
            there = describe_table(spark, self.name) if self.there else {}
        if not self.there:
            return
        if not self.overwrite:
            raise UserError(f"`output` {self.name} exists: give `overwrite=True` to replace it, or another name.")
        if there.get("Type") == "VIEW":
            raise UserError(f"`output` {self.name} is a view: give another name.")
        if there.get("Provider", "").lower() in _FILES:
            if there.get("Type") == "EXTERNAL":
                raise UserError(
                    f"`output` {self.name} is an external table of files in {there.get('Location')}: drop it, or write "
                    'to that folder, with `writer="spark"`.'
                )
            self.staged = f"{self.name}__fft_{uuid.uuid4().hex[:12]}"

    def write(self, rows: DataFrame) -> None:
        """Make a table of the rows, or a version."""
        writer = rows.write if self.table_format is None else rows.write.format(self.table_format)
        if self.there and not self.staged:
            writer = writer.mode("overwrite")
        writer.saveAsTable(self.staged or self.name)
        self.wrote = True

    def parts(self, rows: int, tokens: int) -> list[Part]:
        """The files by their footers; of a table whose files are not for others to read, the whole as one."""
        storage = self._beside()
        if storage is None:
            return [Part(0, self.name, rows, tokens, 0, {})]
        return footer_parts(storage, {n: s for n, s in storage.list().sizes.items() if _is_data(n)})

    def commit(self, manifest: Manifest) -> None:
        """The manifest, then the table takes its place. Raises :class:`UserError` where there is none for it."""
        storage, spark = self._beside(), self.session()
        if storage is not None:
            with reaching(self.name):
                write_list(storage, manifest)
                storage.write(MANIFEST_NAME, manifest.own_json())
        else:
            text = as_property(manifest)
            spark.sql(f"ALTER TABLE {quoted(self.staged or self.name)} SET TBLPROPERTIES ('{PROPERTY}' = '{text}')")
        if self.staged:
            self._take_place(spark)
        place = self._beside()
        say(f"{self.name}: the trainer reads it at {place.name}" if place is not None else f"{self.name}: {_UNREACHED}")

    def _take_place(self, spark: SparkSession) -> None:
        staged, own, older = quoted(self.staged), quoted(self.name), quoted(f"{self.staged}_older")
        spark.sql(f"ALTER TABLE {own} RENAME TO {older}")
        try:
            spark.sql(f"ALTER TABLE {staged} RENAME TO {own}")
        except Exception:
            spark.sql(f"ALTER TABLE {older} RENAME TO {own}")
            raise
        self.staged = ""
        spark.sql(f"DROP TABLE {older}")

    def abandon(self) -> None:
        """Drop what is no older table."""
        if self.wrote and (self.staged or not self.there):
            self.session().sql(f"DROP TABLE IF EXISTS {quoted(self.staged or self.name)}")

    def _beside(self) -> Storage | None:
        """The folder of a table of parquet files that this machine reaches."""
        there = describe_table(self.session(), self.staged if self.staged and self.wrote else self.name)
        if there.get("Provider", "").lower() != "parquet" or "Location" not in there:
            return None
        return table_storage(there["Location"])


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in name.split("/"))


@contextmanager
def catalog_errors(shown: str) -> Iterator[None]:
    """Raise what a catalog says as a :class:`UserError`."""
    try:
        yield
    except (AnalysisException, UnsupportedOperationException) as error:
        hint = f" (for a folder, give ./{shown})" if is_table_name(shown) else ""
        raise UserError(f"Spark cannot write {shown}{hint}: {str(error).splitlines()[0].rstrip('.')}.") from error
    except Exception as error:
        if "Failed to find the data source" in str(error) or "DATA_SOURCE_NOT_FOUND" in str(error):
            raise UserError(
                f"Spark cannot write {shown}: it does not have this format; give `format` another, or Spark what "
                "it needs (--packages)."
            ) from error
        if lacking := lacking_connector(error):
            raise UserError(
                f"Spark cannot write {shown}: {lacking}; part files (without `writer`) need none."
            ) from error
        raise
