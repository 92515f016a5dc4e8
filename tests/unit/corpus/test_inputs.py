"""Folders of documents: every file in them is read once, or left out and counted by its class, or refused by name."""

import bz2
import gzip
import os
from collections import Counter
from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta_logs import delete_rows, write_with_features
from samples import TextKeys

from fft.corpus.files import SourceFile, find_sources, kind_of, spans_of
from fft.corpus.readers import read_lines, read_row_groups
from fft.corpus.records import read_records
from fft.corpus.splits import deal
from fft.data.known import LeftOut, partition_of
from fft.data.lakes import EngineOnly
from fft.errors import UserError


def refusal(function, *given) -> str:
    with pytest.raises(UserError) as raised:
        function(*given)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')
    return folder


def files_read(*inputs: Path, left_out: LeftOut | None = None) -> list[str]:
    sources = find_sources(inputs, left_out=left_out)
    return [os.path.relpath(file.path, inputs[0]) for source in sources for file in source.files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "json"),
        ("a.JSON.GZ", "json"),
        ("a.ndjson.zst", "json"),
        ("a.txt.bz2", "text"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.jsonl.gz.zst", None),
        ("a.jsonl.xz", None),
        ("a.csv", None),
        ("jsonl", None),
        (".jsonl", None),
    ],
)
def test_kinds(name, kind):
    assert kind_of(Path(name)) == kind


def test_what_is_left_out_is_counted_by_its_class(tmp_path):
    root = fill(
        tmp_path / "t", "b/a.jsonl", "a.txt", "x.csv", "y.CSV", "z.jsonl.xz", "q.csv.gz", "README", "_x/a.jsonl"
    )
    fill(root, "_SUCCESS", ".a.jsonl.crc", "deep/er/a.lz4")
    (root / "dead.jsonl").symlink_to("nowhere")
    (root / "again.jsonl").symlink_to("b/a.jsonl")
    os.mkfifo(root / "pipe.txt")
    with open(os.fsencode(root) + b"/n.b\xff", "w"):
        pass
    left_out = LeftOut()
    assert sorted(files_read(root, left_out=left_out)) == ["a.txt", "b/a.jsonl"]
    size = len('{"text": "a"}\n')
    assert left_out.facts()["not_read"] == {
        "links to nothing, and what is no file": {"files": 2, "bytes": 0},
        "files of hidden names (_ or .)": {"files": 1, "bytes": size},
        "links to what is read under another name": {"files": 1, "bytes": 0},
        ".csv files": {"files": 2, "bytes": 2 * size},
        ".jsonl.xz files": {"files": 1, "bytes": size},
        ".csv.gz files": {"files": 1, "bytes": size},
        ".lz4 files": {"files": 1, "bytes": size},
        "files without an ending": {"files": 1, "bytes": size},
        ".b\\xff files": {"files": 1, "bytes": 0},
    }
    assert "2 links to nothing, and what is no file (0 bytes), " in left_out.notes("t")[0]


def test_a_million_endings_are_a_few_classes(tmp_path):
    left_out = LeftOut()
    find_sources([fill(tmp_path, "a.txt", *(f"a.{i:04}" for i in range(300)))], left_out=left_out)
    assert len(left_out.files) == 21
    assert left_out.files["other files"] == 280


def test_links_to_folders_are_followed_once(tmp_path):
    fill(tmp_path, "t/a.jsonl", "elsewhere/b.jsonl", "elsewhere/c/d.jsonl")
    (tmp_path / "t" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "t" / "again").symlink_to(tmp_path / "t" / "more" / "c")
    (tmp_path / "elsewhere" / "c" / "up").symlink_to(tmp_path)
    assert len(files_read(tmp_path / "t")) == 3


def test_a_file_is_read_by_the_link_that_says_what_it_is(tmp_path):
    """As caches have it: contents under hashes, names in a folder of links."""
    fill(tmp_path, "blobs/0a1b", "blobs/2c3d")
    (tmp_path / "snapshots").mkdir()
    for name, blob in (("a.jsonl", "0a1b"), ("again.jsonl", "0a1b"), ("b.txt", "2c3d")):
        (tmp_path / "snapshots" / name).symlink_to(f"../blobs/{blob}")
    left_out = LeftOut()
    assert files_read(tmp_path, left_out=left_out) == ["snapshots/a.jsonl", "snapshots/b.txt"]
    assert left_out.files == {"links to what is read under another name": 1}


def test_a_file_that_is_given_twice_is_refused(tmp_path):
    file = fill(tmp_path, "t/a.jsonl", "u/b.jsonl") / "t" / "a.jsonl"
    (tmp_path / "u" / "c.jsonl").symlink_to(file)
    for other in (file, tmp_path / "t", tmp_path / "u", tmp_path / "u" / "c.jsonl", tmp_path / "t" / ".." / "t"):
        assert " twice, by " in refusal(find_sources, [file, other])
        assert " twice, by " in refusal(find_sources, [other, file])
    assert len(find_sources([tmp_path / "t", tmp_path / "u" / "b.jsonl"])) == 2


def test_names_that_are_no_utf_8_are_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/a\xff.jsonl", "w") as stream:
        stream.write('{"text": "a"}\n')
    said = refusal(find_sources, [tmp_path])
    assert said == f"`inputs`: the name of {tmp_path}/a\\xff.jsonl is no UTF-8: rename it."


def delta(folder: Path, **options) -> Path:
    """Two versions: one document, which another replaces."""
    for name in ("old", "new"):
        deltalake.write_deltalake(str(folder), pa.table({"id": [name], "text": [name]}), mode="overwrite", **options)
    return folder


def texts(sources) -> list[tuple]:
    keys = TextKeys()
    splits = deal(spans_of(sources, keys))
    return sorted(row for split in splits for rows in read_records(split, keys, Counter()) for row in rows)


@pytest.mark.parametrize("partition", [None, ["id"]])
def test_delta_tables_at_any_depth_are_read_by_their_log(partition, tmp_path):
    fill(tmp_path, "t/a.jsonl")
    table = delta(tmp_path / "t" / "b" / "c", partition_by=partition)
    sources = find_sources([tmp_path / "t"])
    assert {source.name for source in sources} == {str(tmp_path / "t"), f"{table}@v1"}
    assert texts([source for source in sources if source.kind == "parquet"]) == [(b"new", "new")]
    assert texts(find_sources([Path(f"{table}@v0")])) == [(b"old", "old")]
    assert refusal(find_sources, [next(table.rglob("*.parquet"))]).endswith(
        "it may be an older version: name the table."
    )
    origin = next(source.origin for source in sources if source.kind == "parquet")
    assert origin["input"] == f"{table}@v1"
    assert origin["fingerprint"] != find_sources([Path(f"{table}@v0")])[0].origin["fingerprint"]


@pytest.fixture
def without_pyiceberg(monkeypatch):
    monkeypatch.setattr("fft.corpus.files.reads_iceberg", lambda: False)


@pytest.mark.usefixtures("without_pyiceberg")
@pytest.mark.parametrize(("kind", "mark"), [("Hudi", ".hoodie/x"), ("Iceberg", "metadata/v1.metadata.json")])
def test_other_tables_are_refused_by_name(kind, mark, tmp_path):
    table = fill(tmp_path, "t/b/c/data/a.parquet", f"t/b/c/{mark}") / "t" / "b" / "c"
    for path in (tmp_path / "t", table):
        assert refusal(find_sources, [path]).startswith(f"`inputs` {table} is of {kind}, whose folder also holds")
        assert f"is of {kind}" in refusal(find_sources, [f"file://{path}"])
    for path in (table / "data", table / "data" / "a.parquet"):
        assert f"lies in the {kind} table {table}" in refusal(find_sources, [path])
        assert f"lies in the {kind} table {table}" in refusal(find_sources, [f"file://{path}"])


def test_ids_of_partitions_are_read_and_other_columns_counted(tmp_path):
    for name in ("id=a%20b/lang=en", "id=c/lang=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": ["x"], "url": ["u"]}), tmp_path / name / "part.parquet")
    left_out = LeftOut()
    sources = find_sources([tmp_path], left_out=left_out)
    assert texts(sources) == [(b"x", "a b"), (b"x", "c")]
    assert left_out.facts() == {"not_read": {"partition column lang": {"files": 2}}}
    assert left_out.notes("t") == ["not read of t: partition column lang (2 files)"]
    other = LeftOut()
    find_sources([tmp_path], "url", other)
    assert other.files == {"partition column id": 2, "partition column lang": 2}
    assert partition_of("a=b=c/d/e=f") == {"a": "b=c"}


def test_parquet_without_rows_and_with_columns_of_one_name(tmp_path):
    pq.ParquetWriter(tmp_path / "empty.parquet", pa.schema([("text", pa.string())])).close()
    assert spans_of(find_sources([tmp_path]), TextKeys()) == []
    assert list(read_row_groups(str(tmp_path / "empty.parquet"), 0, 0, ["text"])) == []
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "twice.parquet")
    said = refusal(spans_of, find_sources([tmp_path]), TextKeys())
    assert said == f"{tmp_path}/twice.parquet has more than one column text: rename all but one."


def test_an_error_of_a_folder_names_the_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    assert f"{tmp_path}/b.parquet: column text is int64" in refusal(spans_of, find_sources([tmp_path]), TextKeys())


def test_what_cannot_be_read_is_said_with_what_to_do(tmp_path, monkeypatch):
    def lines(path):
        return list(read_lines(str(path), 0, 0))

    assert "it must lie under this path on all machines of the cluster" in refusal(lines, tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    assert "is it whole? Restore or remove it" in refusal(lines, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(b"x" * 1000)[:-9])
    assert "is it whole? Restore or remove it" in refusal(lines, tmp_path / "a.jsonl.bz2")
    # A zstd frame that asks for a window of 256 MB, and holds one raw block of one byte.
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, (28 - 10) << 3]) + bytes([0x09, 0, 0]) + b"x"
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    assert "its zstd window is larger than 128 MB: compress it again without --long" in refusal(
        lines, tmp_path / "a.jsonl.zst"
    )

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "have its reading permitted" in refusal(lines, tmp_path / "none.jsonl")


def by_url(url: str, left_out: LeftOut | None = None) -> dict[tuple[str, str], int]:
    return {(one.name, one.kind): len(one.files) for one in find_sources([url], left_out=left_out)}


def test_urls_are_looked_through_like_paths(tmp_path):
    fill(tmp_path, "t/a.jsonl", "t/b.jsonl", "t/c.txt", "t/d.csv", "u/e.jsonl", "u/_f.jsonl", "a b/%41/g#.jsonl")
    delta(tmp_path / "t" / "deep" / "er")
    url, left_out = f"file://{tmp_path}", LeftOut()
    assert by_url(f"{url}/t/", left_out) == {
        (f"{url}/t/deep/er@v1", "parquet"): 1,
        (f"{url}/t", "json"): 2,
        (f"{url}/t", "text"): 1,
    }
    assert left_out.files == {".csv files": 1}
    assert by_url(f"{url}/t/deep/er") == {(f"{url}/t/deep/er@v1", "parquet"): 1}
    assert by_url(f"{url}/t/deep/er@v0") == {(f"{url}/t/deep/er@v0", "parquet"): 1}
    assert by_url(f"{url}/t/a.jsonl") == {(f"{url}/t/a.jsonl", "json"): 1}
    assert by_url(f"{url}/?/[a-e].jsonl") == {(f"{url}/?/[a-e].jsonl", "json"): 3}
    assert by_url(f"{url}/{{t/a,u/*}}.jsonl") == {(f"{url}/{{t/a,u/*}}.jsonl", "json"): 2}
    assert by_url(f"{url}/t/d*")[f"{url}/t/deep/er@v1", "parquet"] == 1
    for name in ("a b/%41/g#.jsonl", "a b/%41", "a b/*/g#*"):  # as they stand, nothing is an escape
        assert by_url(f"{url}/{name}") == {(f"{url}/{name}", "json"): 1}
        assert find_sources([f"{url}/{name}"])[0].files == (SourceFile(f"{tmp_path}/a b/%41/g#.jsonl", 14),)
    assert "lies in the Delta table" in refusal(find_sources, [f"{url}/t/deep/er/*.parquet"])
    assert "holds no documents" in refusal(find_sources, [f"{url}/none/*.jsonl"])
    assert "does not exist" in refusal(find_sources, [f"{url}/none"])
    assert "is of no known kind" in refusal(find_sources, [f"{url}/t/d.csv"])


def test_ids_of_partitions_are_read_by_url_too(tmp_path):
    deltalake.write_deltalake(str(tmp_path / "p"), pa.table({"id": ["a b"], "text": ["b"]}), partition_by=["id"])
    fill(tmp_path, "q/id=a/x.txt")
    (tmp_path / "q/id=c").mkdir()
    pq.write_table(pa.table({"text": ["d"]}), tmp_path / "q/id=c/x.parquet")
    assert texts(find_sources([f"file://{tmp_path}/p"])) == [(b"b", "a b")]
    assert texts(find_sources([f"file://{tmp_path}/q/*/*.parquet"])) == [(b"d", "c")]


@pytest.mark.usefixtures("without_pyiceberg")
def test_what_nothing_here_reaches_is_left_to_an_engine_or_refused(tmp_path):
    table = write_with_features(tmp_path / "t" / "deep", pa.table({"text": ["a", "b"]}), "deletionVectors")
    delete_rows(table, [0])
    fill(tmp_path, "t/ice/metadata/v1.metadata.json", "t/a.jsonl")
    for_engine: list[EngineOnly] = []
    urls = ["dbfs:/x/a.jsonl", "nosuch://bucket/t@v3"]
    sources = find_sources([tmp_path / "t", *urls], for_engine=for_engine)
    assert [(source.name, source.kind) for source in sources] == [(str(tmp_path / "t"), "json")]
    assert [(one.table, one.format, one.version) for one in for_engine] == [
        (str(table), "Delta", 1),
        (str(tmp_path / "t" / "ice"), "Iceberg", None),
        ("dbfs:///x/a.jsonl", "", None),
        ("nosuch://bucket/t", "Delta", 3),
    ]
    assert "uses deletion vectors" in refusal(find_sources, [table])
    for url in urls:
        assert "cannot be reached from here" in refusal(find_sources, [url])
