"""Token tables as inputs: find them, check them by their footers, read them in one common form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, TokenizerInfo
from fft.data.table import Table
from fft.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """A token table with the name under which its rows are placed."""

    name: str
    table: Table

    @cached_property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.table.path)

    @property
    def bytes(self) -> int:
        """Size on disk of its parquet files."""
        return sum(Path(path).stat().st_size for path in {group.path for group in self.table.row_groups})


def is_table(folder: Path) -> bool:
    """Parquet files lie directly in it, or a job of ours wrote it (perhaps only began to)."""
    names = (MANIFEST_NAME, WRITING_NAME, "_temporary", "_delta_log")
    return any((folder / name).exists() for name in names) or any(folder.glob("*.parquet"))


def find_tables(path: Path) -> list[Path]:
    """The table at ``path``, or the tables directly below it, in name order."""
    if not path.exists():
        raise UserError(f"-i {path} does not exist: give a token table or a folder of them.")
    if path.is_file() or is_table(path):
        return [path]
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    tables = [folder for folder in below if is_table(folder)]
    if not tables:
        raise UserError(f"-i {path} holds no token table: write one with spark_jobs/tokenize.py.")
    return tables


def open_datasets(paths: Sequence[Path]) -> list[Dataset]:
    """Open tables under names that depend on where they lie only as far as needed to tell them apart."""
    places = [path.resolve() for path in paths]
    repeated = {path for path in places if places.count(path) > 1}
    if repeated:
        raise UserError(f"-i names {min(repeated)} more than once: give each table once.")
    depth = 1
    while len({_name(path, depth) for path in places}) < len(places):
        depth += 1
    return [Dataset(_name(place, depth), Table.open(path)) for place, path in zip(places, paths, strict=True)]


def _name(path: Path, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def common_tokenizer(datasets: Sequence[Dataset]) -> TokenizerInfo | None:
    """The tokenizer of all tables that know theirs. Raises :class:`UserError` when they differ."""
    known = {d.name: d.table.manifest.tokenizer for d in datasets if d.table.manifest and d.table.manifest.tokenizer}
    if len({info.sha256 for info in known.values()}) > 1:
        names = ", ".join(f"{name}: {info.name}" for name, info in sorted(known.items()))
        raise UserError(f"the tables were made with different tokenizers ({names}): tokenize them with one.")
    return next(iter(known.values()), None)


def read_tokens(spark: SparkSession, datasets: Sequence[Dataset]) -> DataFrame:
    """Rows of all tables: ``dataset``, ``input_ids``, ``doc_ids``, and ``labels`` and ``cu_seqlens`` if any has them.

    A table without them gets what their absence means: labels equal to the ids, one document a row. Rows without
    ``doc_ids`` are named after a hash of their content.
    """
    columns = frozenset().union(*(d.table.columns for d in datasets))
    frames = [_read(spark, dataset, columns) for dataset in datasets]
    df = frames[0]
    for frame in frames[1:]:
        df = df.union(frame)
    return df


def _read(spark: SparkSession, dataset: Dataset, wanted: frozenset[str]) -> DataFrame:
    df = spark.read.option("recursiveFileLookup", "true").parquet(dataset.path.absolute().as_uri())
    ids = F.col("input_ids").cast("array<int>")
    content = F.array(F.lower(F.hex(F.xxhash64(ids))))
    selected = [F.lit(dataset.name).alias("dataset"), ids.alias("input_ids")]
    if "doc_ids" in df.columns:
        names = F.col("doc_ids").cast("array<string>")
        selected.append(F.when(F.size(names) > 0, names).otherwise(content).alias("doc_ids"))
    else:
        selected.append(content.alias("doc_ids"))
    if "labels" in wanted:
        selected.append((F.col("labels").cast("array<int>") if "labels" in df.columns else ids).alias("labels"))
    if "cu_seqlens" in wanted:
        bounds = (
            F.col("cu_seqlens").cast("array<int>") if "cu_seqlens" in df.columns else F.array(F.lit(0), F.size(ids))
        )
        selected.append(bounds.alias("cu_seqlens"))
    return df.select(*selected)


def int_columns(df: DataFrame) -> list[str]:
    """The columns that hold lists of int32."""
    return [name for name in ("input_ids", "labels", "cu_seqlens") if name in df.columns]
