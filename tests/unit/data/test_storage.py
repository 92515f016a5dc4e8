"""Tables by path and by URL: what an object store would give, from pyarrow's file system for file://."""

import os
import pickle
from pathlib import Path

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from pyarrow import fs
from samples import read_sample

from fft.data.commits import begin_writing, commit
from fft.data.manifest import MANIFEST_NAME, FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.storage import Storage, is_url, whole
from fft.data.table import Table
from fft.errors import UserError

ROWS = [np.arange(n, dtype=np.int32) for n in (3, 8, 5, 1, 8, 2)]


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path / "t", ROWS, files=2, row_group_size=2)


def with_manifest(folder):
    files = tuple(FileInfo(p.name, 3, 0, p.stat().st_size) for p in sorted(folder.glob("*.parquet")))
    commit(folder, Manifest(files, 6, 27))


@pytest.mark.parametrize("finished", [False, True])
def test_a_table_by_url_is_the_table(folder, finished):
    if finished:
        with_manifest(folder)
    local, remote = Table.open(folder), Table.open(f"file://{folder}/")
    sizes = [[(g.index, g.rows, g.tokens) for g in table.row_groups] for table in (remote, local)]
    assert sizes[0] == sizes[1]
    assert remote.source == f"file://{folder}"
    assert Table.open(Path(f"file://{folder}")).source == remote.source  # a path swallows slashes
    assert (remote.manifest is None) == (not finished)
    ours, theirs = SampleReader(remote, 8, 1), SampleReader(local, 8, 1)
    for index in range(2 * theirs.samples_per_epoch):
        assert read_sample(ours, index).input_ids.tolist() == read_sample(theirs, index).input_ids.tolist()


def refused(folder, sentence):
    with pytest.raises(UserError, match=sentence):
        Table.open(f"file://{folder}")


def test_what_is_no_table_is_named(folder, tmp_path):
    refused(tmp_path / "none", r"file://.*none does not exist: give a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no parquet files")
    with pytest.raises(UserError, match="cannot be listed"):
        Table.open("nosuch://bucket/table")
    begin_writing(folder, {})
    refused(folder, "is unfinished")


def test_a_changed_table_is_named(folder):
    with_manifest(folder)
    pq.write_table(pa.table({"input_ids": pa.array([[1]], pa.list_(pa.int32()))}), folder / "stray.parquet")
    refused(folder, r"stray\.parquet is not in the manifest of file://")
    (folder / "stray.parquet").rename(folder / "part-00001.parquet")
    refused(folder, r"part-00001\.parquet has \d+ bytes, its manifest says")
    (folder / "part-00001.parquet").unlink()
    refused(folder, r"part-00001\.parquet is in the table's manifest but is missing: restore it")
    (folder / MANIFEST_NAME).write_bytes(b"\xff")
    refused(folder, "not a manifest|is no manifest|JSON")


def test_a_version_of_what_is_no_delta_table_is_refused(folder):
    with pytest.raises(UserError, match="is no Delta table: leave out @v3"):
        Table.open(f"file://{folder}@v3")


def listed(storage):
    listing = storage.list()
    return dict(listing.sizes), {name for name in listing.folders if name != "."}


def test_a_listing_has_what_lies_there(tmp_path, monkeypatch):
    """Of a path, a URL and, as of a store, names alone. Links to files count; those to folders may make circles."""
    (tmp_path / "t" / "a b" / "c").mkdir(parents=True)
    (tmp_path / "t" / "a b" / "x").write_text("12")
    (tmp_path / "t" / "empty").mkdir()
    (tmp_path / "t" / "link").symlink_to(tmp_path / "t" / "a b" / "x")
    (tmp_path / "t" / "broken").symlink_to(tmp_path / "nowhere")
    expected = {"a b/x": 2, "link": 2}, {"a b", "a b/c", "empty"}
    url = f"file://{tmp_path}/t/".replace(" ", "%20")
    assert listed(Storage.at(url)) == listed(Storage.at(tmp_path / "t")) == expected
    assert listed(Storage("t", "t", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))) == expected
    (tmp_path / "t" / "circle").symlink_to(tmp_path / "t")
    assert listed(Storage.at(tmp_path / "t")) == expected
    assert listed(Storage.at(tmp_path / "t" / "link")) == ({"": 2}, set())
    monkeypatch.chdir(tmp_path)
    assert listed(Storage.at("t")) == expected
    assert (Storage.at("t/").read("link"), Storage.at("t").shown("link")) == (b"12", "t/link")


def test_links_are_followed_once(tmp_path):
    """Names without links count; what is passed over does not stand for what is not."""
    for name in ("t/a/b/x", "t/_attic/y", "t/.store/data/z", "elsewhere/deep/w", "elsewhere/v"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[-1])
    links = {"0": "a", "a/up": "..", "a/b/top": "/", "out": "../elsewhere", "out2": "../elsewhere/deep", "v2": "out/v"}
    links |= {"x2": "a/b/x", "y2": "_attic/y", "data": ".store/data", "_attic/again": "../_attic", "dead": "nowhere"}
    for name, target in links.items():
        (tmp_path / "t" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "t")
    os.mkfifo(tmp_path / "t" / "pipe")
    listing = Storage.at(tmp_path / "t").list()
    assert listing.dead == {"dead", "pipe"}
    assert set(listing.repeated) == {"0", "a/up", "a/b/top", "_attic/again", "x2", "out2", "out/back", "v2"}
    used = {name for name in listing.sizes.keys() - listing.repeated if not name.startswith((".", "_"))}
    assert used == {"a/b/x", "out/v", "out/deep/w", "y2", "data/z"}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(.*Permission denied.*\): check the address"):
        Table.open(tmp_path)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_paths_and_urls_are_refused_alike(folder, tmp_path, prefix):
    with pytest.raises(UserError, match="is a folder of tables"):
        (with_manifest(folder), Table.open(f"{prefix}{tmp_path}"))
    assert Table.open(f"{prefix}{folder}/part-00001.parquet").rows == 3
    (folder / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=rf"^{prefix}{folder}/part-00001\.parquet is in the table's manifest but is m"):
        Table.open(f"{prefix}{folder}")
    with pytest.raises(UserError, match=rf"^{prefix}{folder} is no Delta table: leave out @v3, or give one\.$"):
        Table.open(f"{prefix}{folder}@v3")


@pytest.mark.parametrize("by", ["path", "url", "link"])
def test_a_delta_table_whatever_its_folder_is_called(by, tmp_path):
    """The log escapes names; the folder's own and those of its partitions."""
    place = tmp_path / "a b%c" / "t"
    kind = pa.list_(pa.int32())
    for mode in ("error", "append"):
        rows = pa.table({"input_ids": pa.array([[1, 2], [3]], kind), "lang": ["a b", "c%d"]})
        deltalake.write_deltalake(str(place), rows, partition_by=["lang"], mode=mode)
    path = {"path": place, "url": "file://" + str(place).replace("%", "%25").replace(" ", "%20")}.get(by)
    if by == "link":
        path = tmp_path / "link"
        path.symlink_to(place)
    assert [Table.open(f"{path}{version}").tokens for version in ("", "@v0")] == [6, 3]
    assert {group.path.count("%") for group in Table.open(path).row_groups} == {1 if by == "link" else 2}
    next(place.glob("lang=a%20b/*.parquet")).unlink()
    with pytest.raises(UserError, match=r"lang=a%20b/part-.* is in the Delta log of .* but is missing: was the table"):
        Table.open(path)


def test_an_open_table_travels_to_another_process(folder):
    for name in (folder, f"file://{folder}"):
        table = pickle.loads(pickle.dumps(Table.open(name)))
        assert table.read(0).input_ids.tolist() == Table.open(name).read(0).input_ids.tolist()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (Path("s3://lake/a b"), "s3://lake/a b"),
        ("s3a:/lake", "s3a://lake"),
        ("s3://lake/x", "s3://lake/x"),
        ("dbfs:/x", "dbfs:///x"),
        ("hdfs://node:8020/x", "hdfs://node:8020/x"),
        ("hdfs:/x", "hdfs:///x"),
        ("file:///x", "file:///x"),
    ],
)
def test_a_url_has_all_of_its_slashes(given, meant):
    assert is_url(given)
    assert whole(str(given)) == meant
    assert not is_url(str(given).replace("/", "_"))
