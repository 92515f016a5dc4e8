"""Iceberg tables as ``pyiceberg`` writes them: the newest rows alone, or refused by name."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from samples import TextKeys

from fft.corpus.files import find_sources, spans_of
from fft.corpus.readers import read_row_groups
from fft.data.lakes import EngineOnly
from fft.errors import UserError

pyiceberg = pytest.importorskip("pyiceberg", reason="pip install 'pyiceberg[sql-sqlite]'")


@pytest.fixture
def made(tmp_path):
    """A table with an overwritten and an appended version, made through a catalog."""
    from pyiceberg.catalog.sql import SqlCatalog

    (tmp_path / "lake").mkdir()
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/lake")
    catalog.create_namespace("n")
    table = catalog.create_table("n.t", pa.schema([("id", pa.string()), ("text", pa.string())]))
    table.append(rows("old"))
    table.overwrite(rows("new"))
    table.append(rows("newer"))
    return table


def rows(name: str) -> pa.Table:
    return pa.table({"id": [name, f"{name} too"], "text": [name, name]})


def folder_of(table) -> Path:
    return Path(table.location().removeprefix("file://"))


def texts(sources) -> list[str]:
    spans = spans_of(sources, TextKeys())
    batches = [b for span in spans for b in read_row_groups(span.path, span.start, span.stop, ["text"])]
    return sorted(text for batch in batches for text in batch.column("text").to_pylist())


def refusal(folder: Path) -> str:
    with pytest.raises(EngineOnly) as raised:
        find_sources([folder])
    assert raised.value.format == "Iceberg"
    return str(raised.value)


def test_the_newest_snapshot_is_read_at_any_depth(made, tmp_path):
    for given in (folder_of(made), tmp_path / "lake", f"file://{folder_of(made)}"):
        (source,) = find_sources([given])
        assert source.name.endswith(f"t@{made.metadata.current_snapshot_id}")
        assert texts([source]) == ["new", "new", "newer", "newer"]


def test_a_column_that_is_added_is_read_and_one_that_is_renamed_is_not(made):
    with made.update_schema() as update:
        update.add_column("more", pyiceberg.types.StringType())
    assert texts(find_sources([folder_of(made)])) == ["new", "new", "newer", "newer"]
    with made.update_schema() as update:
        update.rename_column("text", "content")
        update.rename_column("more", "text")
    assert "t had a column renamed, or dropped and made anew: have Spark read it" in refusal(folder_of(made))


def test_what_only_a_catalog_knows_and_what_was_moved_is_refused(made, tmp_path):
    folder = folder_of(made)
    shutil.copytree(folder, tmp_path / "copy")
    assert "was moved or copied here from file://" in refusal(tmp_path / "copy")
    newest = max((folder / "metadata").glob("*.metadata.json"))
    shutil.copy(newest, newest.with_name(newest.name[:6] + "other.metadata.json"))
    assert "has 2 newest metadata files, of which only its catalog knows the right one" in refusal(folder)


def test_a_table_that_is_broken_is_named(made):
    metadata = folder_of(made) / "metadata"
    for broken in ([*metadata.glob("snap-*.avro")], [max(metadata.glob("*.metadata.json"))]):
        for file in broken:
            file.write_text("{}")
        with pytest.raises(UserError, match=r"metadata\.json cannot be read .*: is the Iceberg table whole"):
            find_sources([folder_of(made)])
