"""Delta logs as others write them, and commits that are repeated or race."""

from concurrent.futures import ThreadPoolExecutor

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta_logs import delete_rows, map_columns, write_with_features

from fft.data.delta import commit_delta, latest_version, read_snapshot
from fft.data.lakes import EngineOnly
from fft.data.manifest import FileInfo, Manifest
from fft.data.storage import Storage
from fft.data.table import Table
from fft.errors import UserError

KIND = pa.list_(pa.int32())
ROWS = pa.table({"input_ids": pa.array([[1, 2], [3], [4, 5, 6]], KIND)})


def test_a_table_that_may_have_deletion_vectors_and_has_none_is_read(tmp_path):
    features = ("deletionVectors", "timestampNtz", "columnMapping", "v2Checkpoint")
    folder = write_with_features(tmp_path / "a b", ROWS, *features)
    assert Table.open(folder).tokens == 6
    delete_rows(folder, [1])
    assert Table.open(f"{folder}@v0").tokens == 6
    with pytest.raises(EngineOnly, match="a b uses deletion vectors, which is not read here: have Spark read it") as no:
        Table.open(folder)
    assert (no.value.table, no.value.format, no.value.version) == (str(folder), "Delta", 1)


def test_what_decides_the_rows_beside_the_files_is_refused_by_name(tmp_path):
    for feature in ("nextYears", "catalogManaged"):  # its commits lie in a catalog: its log alone may be old
        folder = write_with_features(tmp_path / feature, ROWS, feature, "timestampNtz")
        with pytest.raises(UserError, match=f"{feature} cannot be opened: .*({feature}|catalog-managed)"):
            Table.open(folder)
    deltalake.write_deltalake(str(tmp_path / "mapped"), ROWS)
    map_columns(tmp_path / "mapped", {"input_ids": "labels"})
    with pytest.raises(EngineOnly, match="uses column mapping"):
        Table.open(tmp_path / "mapped")


def write(folder, first: int, job: str) -> Manifest:
    """A part of one row, and what a job would commit of it."""
    folder.mkdir(exist_ok=True)
    name = f"part-00000-{job}.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([[first]], KIND)}), folder / name)
    return Manifest((FileInfo(name, 1, 1, (folder / name).stat().st_size),), 1, 1, lineage={"job": job})


def test_a_commit_that_is_repeated_changes_nothing(tmp_path):
    folder, table = tmp_path / "t", Storage.at(tmp_path / "t")
    first, second = write(folder, 1, "a"), write(folder, 2, "b")
    assert commit_delta(table, first) == 0
    assert commit_delta(table, first) == 0
    assert commit_delta(table, second, 0) == 1
    assert commit_delta(table, second, 0) == 1  # though another version was seen, and this is the latest
    assert commit_delta(table, first) == 0
    assert latest_version(table) == 1
    assert read_snapshot(table).names == ("part-00000-b.parquet",)


@pytest.mark.parametrize("seen", [None, 0])
def test_a_commit_of_which_the_answer_was_lost_is_found(seen, tmp_path, monkeypatch):
    folder, table = tmp_path / "t", Storage.at(tmp_path / "t")
    if seen is not None:
        commit_delta(table, write(folder, 1, "a"))
    manifest = write(folder, 2, "b")
    own = "create_table_with_add_actions" if seen is None else "create_write_transaction"
    where = deltalake.transaction if seen is None else deltalake.DeltaTable
    commit = getattr(where, own)

    def loses(*what, **more):
        commit(*what, **more)
        raise OSError("the connection was closed")

    monkeypatch.setattr(where, own, loses)
    assert commit_delta(table, manifest, seen) == (0 if seen is None else 1)
    assert read_snapshot(table).manifest == manifest


def test_an_append_between_the_last_look_and_the_commit_is_kept(tmp_path):
    folder, table = tmp_path / "t", Storage.at(tmp_path / "t")
    commit_delta(table, write(folder, 1, "a"))
    deltalake.write_deltalake(str(folder), pa.table({"input_ids": pa.array([[7]], KIND)}), mode="append")
    with pytest.raises(UserError, match=r"another writer committed version 1 .*\(version 0 was the latest"):
        commit_delta(table, write(folder, 2, "b"), 0)
    with pytest.raises(UserError, match=r"another writer committed version 1 .*\(there was no table"):
        commit_delta(table, write(folder, 2, "b"))
    assert Table.open(folder).tokens == 2


def test_of_writers_that_begin_at_one_version_one_commits(tmp_path):
    """And others that append all the while lose nothing."""
    folder, table = tmp_path / "t", Storage.at(tmp_path / "t")
    for round_ in range(3):
        seen = latest_version(table)
        manifests = [write(folder, 1, f"{round_}{writer}") for writer in range(4)]

        def commits(manifest, seen=seen):
            try:
                return commit_delta(table, manifest, seen)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            done = list(pool.map(commits, manifests))
        (winner,) = (number for number, what in enumerate(done) if isinstance(what, int))
        assert all("another writer committed" in what for what in done if isinstance(what, str))
        assert read_snapshot(table).manifest == manifests[winner]
        deltalake.write_deltalake(str(folder), pa.table({"input_ids": pa.array([[7]], KIND)}), mode="append")
    assert latest_version(table) == 5
    assert [Table.open(f"{folder}@v{version}").tokens for version in (1, 3, 5)] == [2, 2, 2]


def test_a_path_that_the_log_would_take_for_another_is_refused(tmp_path):
    with pytest.raises(UserError, match="%41 in its path is read as another character"):
        commit_delta(Storage.at(tmp_path / "t%41"), write(tmp_path / "t%41", 1, "a"))
