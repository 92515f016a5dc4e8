"""Tables of an S3 object store: a SeaweedFS server on loopback, found through the environment alone."""

import bz2
import gzip
import json
from collections import Counter

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from failing_store import throttled
from pyarrow import fs
from samples import TextKeys, read_sample

from fft.corpus.files import SourceFile, find_sources, spans_of
from fft.corpus.readers import read_lines
from fft.corpus.records import read_records
from fft.corpus.splits import deal
from fft.data.asking import asking
from fft.data.batches import BatchPlan, Loader
from fft.data.blend import Blend, parse_tables
from fft.data.commits import begin_writing, commit
from fft.data.delta import commit_delta
from fft.data.known import LeftOut
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.storage import Storage
from fft.data.table import Table
from fft.errors import UserError

ROWS = [np.arange(n, dtype=np.int32) for n in (3, 8, 5, 1, 8, 2)]


def upload(store, folder, name):
    fs.copy_files(str(folder), f"lake/{name}", fs.LocalFileSystem(), store)
    return f"s3://lake/{name}"


def finished(folder):
    files = tuple(FileInfo(p.name, 3, 0, p.stat().st_size) for p in sorted(folder.glob("*.parquet")))
    return Manifest(files, 6, 27)


def samples(reader, count):
    return [read_sample(reader, index).input_ids.tolist() for index in range(count)]


def check_same(remote, local):
    ours, theirs = SampleReader(remote, 8, 1), SampleReader(local, 8, 1)
    assert samples(ours, 2 * theirs.samples_per_epoch) == samples(theirs, 2 * theirs.samples_per_epoch)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_table_of_the_store_is_the_table(foreign, store, tmp_path):
    folder = write_table(tmp_path / "t", ROWS, files=2, row_group_size=2)
    if not foreign:
        commit(folder, finished(folder))
    table = Table.open(upload(store, folder, f"table-{foreign}") + "/")
    assert (table.manifest is None, table.source) == (foreign, f"s3://lake/table-{foreign}")
    check_same(table, Table.open(folder))


def test_tables_of_the_store_blend_with_local_ones(store, tmp_path):
    folder = write_table(tmp_path / "t", ROWS, files=2, row_group_size=2)
    tables = parse_tables(f"{upload(store, folder, 'blend')}:0.7 {folder}:0.3", "train_data")
    readers = [SampleReader(Table.open(path), 8, 1) for path, _ in tables]
    blend = Blend(readers, [weight for _, weight in tables], "drop")
    steps = list(Loader(blend, BatchPlan(1, 0, 1, 1), blend.samples_per_epoch))
    assert sum(batch.input_ids.sum() for (batch,) in steps) == 2 * sum(row.sum() for row in ROWS)


def test_versions_of_a_delta_table(store):
    """Written straight into the store, in folders whose names must be escaped."""
    url = "s3://lake/versions"
    kind = pa.list_(pa.int32())
    first = pa.table({"input_ids": pa.array([[1, 2], [3]], kind), "lang": ["a b", "c%d"]})
    deltalake.write_deltalake(url, first, partition_by=["lang"])
    deltalake.write_deltalake(url, pa.table({"input_ids": pa.array([[9]], kind), "lang": ["a b"]}), mode="append")
    latest, old = Table.open(url), Table.open(f"{url}@v0")
    assert (latest.source, latest.tokens) == (f"{url}@v1", 4)
    assert (old.source, old.tokens) == (f"{url}@v0", 3)
    read = [old.read(group).input_ids.tolist() for group in range(len(old.row_groups))]
    assert sorted(read) == [[1, 2], [3]]
    with pytest.raises(UserError, match="s3://lake/versions@v7 cannot be opened: "):
        Table.open(f"{url}@v7")
    (file,) = (f for f in store.get_file_info(fs.FileSelector("lake/versions/lang=c%25d")) if f.size)
    store.delete_file(file.path)
    with pytest.raises(UserError, match=r"lang=c%25d/part-.* in the Delta log of .* is missing: was the table vac"):
        Table.open(url)


def test_raw_inputs_by_url_are_looked_through(store, tmp_path):
    """Also under the scheme by which Hadoop calls the same store; what an engine is to read keeps it."""
    (tmp_path / "raw").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.csv", "_d.jsonl"):
        (tmp_path / "raw" / name).write_text("{}")
    upload(store, tmp_path / "raw", "searched")
    for name in ("old", "new"):
        deltalake.write_deltalake("s3://lake/searched/deep/er", pa.table({"text": [name]}), mode="overwrite")
    for scheme in ("s3", "s3a"):
        left_out, url = LeftOut(), f"{scheme}://lake/searched"
        table, texts = find_sources([f"{url}/"], left_out=left_out)
        assert (table.name, texts.name) == (f"{url}/deep/er@v1", url)
        assert len(table.files) == 1
        assert texts.files == (SourceFile(f"{url}/a.jsonl", 2), SourceFile(f"{url}/b.jsonl", 2))
        assert table.files[0].path.startswith(f"{url}/deep/er/part-")
        assert left_out.files == {".csv files": 1, "files of hidden names (_ or .)": 1}
        assert [one.files for one in find_sources([f"{url}/?.json*"])] == [texts.files]
        assert find_sources([f"{url}/deep/er@v0"])[0].files != table.files
        for given, said in (
            ([table.files[0].path], "lies in the Delta table lake/searched/deep/er, of which it"),
            ([f"{scheme}://lake/none"], f"{scheme}://lake/none does not exist"),
            ([url, "s3://lake/searched/a.jsonl"], "a.jsonl twice, by "),
        ):
            with pytest.raises(UserError, match=said):
                find_sources(given)


def test_records_of_the_store_are_those_of_a_local_copy(store, tmp_path):
    """Cut at the same bytes, by names that a URL would have to escape; whatever packed them."""
    rows = [{"id": str(i), "text": f"document {i} " + "x" * (i % 50)} for i in range(3000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    folder = tmp_path / "a b" / "100%41#"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "d.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    (folder / "e.txt").write_text("\n\n".join(row["text"] for row in rows))
    for file in ("id=a b/f.parquet", "id=c/f.parquet"):
        (folder / file).parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows).drop("id"), folder / file, row_group_size=700)
    upload(store, tmp_path / "a b", "copied/a b")

    def read(*given):
        splits = deal(spans_of(find_sources(given), TextKeys()))
        return [(split.part, [*read_records(split, TextKeys(), Counter())]) for split in splits]

    local = read(folder)
    assert len({part for part, _ in local}) > 5
    assert read("s3a://lake/copied/a b/100%41#") == read("s3://lake/copied/*/100*") == local


def test_a_file_that_goes_while_it_is_read_is_named(store, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (source,) = find_sources([upload(store, tmp_path, "gone")])
    store.delete_file("lake/gone/a.jsonl")
    with pytest.raises(UserError, match=r"s3://lake/gone/a\.jsonl cannot be read .* it must stay there while the job"):
        list(read_lines(source.files[0].path, 0, 0))


def test_a_delta_table_that_our_jobs_committed(store, tmp_path):
    folder = write_table(tmp_path / "t", ROWS, files=2, row_group_size=2)
    manifest = finished(folder)
    commit_delta(Storage.at(folder), manifest)
    table = Table.open(upload(store, folder, "ours"))
    assert (table.manifest, table.version) == (manifest, 0)
    check_same(table, Table.open(folder))


def test_what_is_wrong_in_the_store_is_named(store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"s3://lake/none does not exist: give a folder"):
        Table.open("s3://lake/none")
    folder = write_table(tmp_path / "t", ROWS)
    begin_writing(folder, {})
    with pytest.raises(UserError, match="is unfinished"):
        Table.open(upload(store, folder, "unfinished"))
    commit(folder, finished(folder))
    url = upload(store, folder, "changed")
    with store.open_output_stream("lake/changed/part-00001.parquet") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"part-00001\.parquet has 1 bytes, its manifest says"):
        Table.open(url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"cannot be listed .*: check the address and this machine's credentials"):
        Table.open(url)


@pytest.fixture(params=["local", "s3", "s3a"])
def place(request, store, tmp_path):
    """An empty place of each kind, and its URL or path."""
    if request.param == "local":
        return Storage.at(tmp_path / "place")
    return Storage.at(f"{request.param}://lake/{tmp_path.name}/place")


def test_files_are_written_listed_and_removed_alike(place):
    assert place.here() == {}
    place.make()
    place.write("a.json", "1")
    place.write("a.json", b"22")
    place.below("deep").make()
    place.below("deep").write("b", "3")
    assert (place.here(), place.read("a.json"), place.exists("deep/b")) == ({"a.json": 2, "deep": None}, b"22", True)
    assert place.info("a.json").mtime_ns > 0
    place.move("a.json", "deep/b")
    assert (place.here(), place.read("deep/b")) == ({"deep": None}, b"22")
    place.delete(["deep/b", "none"])
    place.delete(["none"])
    place.below("deep").delete_empty()
    assert place.here() == {}
    place.below("deep").make()
    place.below("deep").write("c/d", "4") if not place.is_local else place.below("deep").write("c", "4")
    place.below("deep").delete_empty()
    assert list(place.here()) == ["deep"]
    place.delete_folder("deep")
    place.delete_folder("deep")
    assert place.here() == {}


def test_a_large_file_is_there_when_it_is_closed_or_not_at_all(place):
    place.make()
    whole, given_up = place.create("whole"), place.create("given-up")
    for _ in range(12):  # more than one part of an upload
        whole.stream.write(b"x" * (1 << 20))
        given_up.stream.write(b"x" * (1 << 20))
    assert place.is_local or place.here() == {}
    assert whole.close() == 12 << 20
    given_up.discard()
    assert place.here() == {"whole": 12 << 20}


def test_a_store_that_is_busy_is_asked_again(store, monkeypatch):
    waited, said = [], []
    monkeypatch.setattr("time.sleep", waited.append)

    def busy(times, text):
        def ask():
            said.append(text)
            if len(said) <= times:
                raise OSError(text)
            return "done"

        del said[:], waited[:]
        return ask

    for text in (
        "AWS Error SLOW_DOWN during PutObject",
        "AWS Error UNKNOWN (HTTP status 503)",
        "curlCode: 7",
        "Timed out",
    ):
        assert asking(busy(3, text)) == "done"
        assert waited[0] < waited[2] < 2
    with pytest.raises(OSError, match="503"):
        asking(busy(99, "HTTP status 503"))
    assert (len(said), len(waited)) == (6, 5)
    for text in ("AWS Error ACCESS_DENIED", "No such file or directory", "HTTP status 403"):
        with pytest.raises(OSError, match=text):
            asking(busy(1, text))
        assert not waited


def test_a_server_that_refuses_one_request_in_three(store_environment, store, tmp_path, monkeypatch):
    """With HTTP 503: whatever is asked of it is done in the end."""
    with throttled(store_environment["AWS_ENDPOINT_URL"], 3) as (url, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        place = Storage.at(f"s3://lake/{tmp_path.name}")
        for number in range(5):
            place.write(f"{number}", "x" * number)
        large = place.create("large")
        large.stream.write(b"x" * (11 << 20))
        assert large.close() == 11 << 20
        assert place.here() == {**{f"{number}": number for number in range(5)}, "large": 11 << 20}
        assert place.read("4") == b"xxxx"
        place.delete([f"{number}" for number in range(5)])
        assert list(place.here()) == ["large"]
    assert counts["refused"] > 5


def test_a_store_that_is_busy_costs_no_run(store, tmp_path, monkeypatch):
    """A row group is asked for again; what is no trouble of the store's is said at once."""
    folder = write_table(tmp_path / "t", ROWS)
    table, own, said = Table.open(upload(store, folder, "busy")), pq.ParquetFile, []
    monkeypatch.setattr("time.sleep", said.append)

    def busy(*given, **options):
        if len(said) < 2:
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")
        return own(*given, **options)

    monkeypatch.setattr(pq, "ParquetFile", busy)
    assert table.read(0).input_ids.tolist() == Table.open(folder).read(0).input_ids.tolist()
    assert len(said) == 2
    store.delete_dir("lake/busy")
    with pytest.raises(
        UserError, match=r"part-00000.parquet, row group 0 cannot be read .*: see what its storage says"
    ):
        table.read(0)
    assert len(said) == 2


def test_names_are_taken_as_they_stand(store, tmp_path):
    """Blanks and what looks like an escape, in folders and in files; workers are told names that lead there."""
    folder = write_table(tmp_path / "a b%41#", ROWS, files=2)
    (folder / "part-00001.parquet").rename(folder / "part 1%20.parquet")
    url = upload(store, folder, "odd/a b%41#")
    table = Table.open(url)
    assert sorted(table.locations) == [f"{url}/part 1%20.parquet", f"{url}/part-00000.parquet"]
    assert all(Storage.at(file).info().is_file for file in table.locations)
    assert Table.open(folder).fingerprint == table.fingerprint
    place = Storage.at(f"{url}/new")
    place.write("x%41 y", "1")
    assert (list(place.here()), place.read("x%41 y")) == (["x%41 y"], b"1")
