"""Inputs by chance: of folder trees and parquet schemas every document is accounted for, or a sentence refuses them."""

import contextlib
import gzip
import os
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from samples import TextKeys

from fft.corpus.files import find_sources, kind_of, spans_of
from fft.corpus.records import first_malformed, read_records
from fft.corpus.splits import deal
from fft.data.arrow_lists import lists_to_bytes
from fft.data.known import LeftOut
from fft.data.table import Table
from fft.errors import UserError
from fft.text.records import Malformed
from spark_jobs.token_table.rows import doc_ids, token_lists

#: ``FUZZ_EXAMPLES=10000`` looks longer.
EXAMPLES = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KEYS = TextKeys()


@contextlib.contextmanager
def refused():
    """One sentence may end it; any other error is a fault."""
    said = "nothing"
    try:
        yield
    except UserError as error:
        said = str(error)
    note(said)
    event("nothing was refused" if said == "nothing" else "refused")
    assert len(said.splitlines()) == 1
    assert said.encode()


def documents(sources) -> Counter[str]:
    """How many records of each file are documents, or malformed, as a worker would read them."""
    found: Counter[str] = Counter()
    for split in deal(spans_of(sources, KEYS)):
        for records in read_records(split, KEYS, Counter()):
            for record, doc_id in records:
                with contextlib.suppress(Malformed):
                    text, name = KEYS.parse(split.kind, record, doc_id)
                    assert isinstance(name, str)
                    text.encode()
                found[os.path.realpath(split.path)] += 1
    return found


# Folder trees.

FOLDERS = ["a", "b", "c", "lang=en", "id=7", "x.parquet", "_h", ".h"] * 4 + ["metadata", "_delta_log", ".hoodie"]
FILES = ["1.jsonl", "2.JSON.gz", "3.txt", "4.parquet", "5.csv", "6", "_7.jsonl", "8.parquet.gz", "9.jsonl.xz", ".txt"]
FILES += ["v1.metadata.json", "é ü.jsonl", "a b#c?d%20.txt", "[x]*.ndjson"]
PLACES = st.lists(st.sampled_from(FOLDERS), max_size=3)
ENTRIES = st.lists(st.tuples(PLACES, st.sampled_from(FILES), st.integers(0, 3)), max_size=8)
TARGETS = st.tuples(PLACES, st.sampled_from([*FILES, "..", ""]))
LINKS = st.lists(st.tuples(PLACES, st.sampled_from([*FILES, "l"]), TARGETS), max_size=4)


def write(path: Path, rows: int) -> int | None:
    """A file of so many documents; None where there is one already, or a file in the place of its folder."""
    if path.exists() or not _make(path.parent):
        return None
    kind, lines = kind_of(path), b'{"text": "t"}\n' * rows
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array(["t"] * rows, pa.string())}), path)
    elif kind == "text":
        path.write_bytes(b"\n\n".join([b"t"] * rows))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return rows if kind else None


def _make(folder: Path) -> bool:
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        folder.mkdir(parents=True, exist_ok=True)
        return True
    return False


def visible_files(root: Path) -> tuple[dict[str, set[str]], int]:
    """Real files, with the names by which they can be reached without hidden ones; and the number of other names."""
    found: dict[str, set[str]] = {}
    seen: set[str] = set()
    dead, waiting = 0, [root]
    while waiting:
        folder = waiting.pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        for path in folder.iterdir():
            if path.name.startswith(("_", ".")):
                continue
            if path.is_symlink() and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(path)):
                continue  # leads out, above
            if path.is_dir():
                waiting.append(path)
            elif path.is_file():
                found.setdefault(os.path.realpath(path), set()).add(path.name)
            else:
                dead += 1
    return found, dead


@EXAMPLES
@given(ENTRIES, LINKS, st.booleans())
def test_every_file_of_a_tree_is_read_once_or_counted(entries, links, by_url):
    with tempfile.TemporaryDirectory() as folder, refused():
        root = Path(folder, "t")
        root.mkdir()
        written: dict[str, int | None] = {}
        for place, name, rows in entries:
            path = root.joinpath(*place, name)
            written.setdefault(str(path), write(path, rows))
        for place, name, (target_place, target) in links:
            path = root.joinpath(*place, name)
            if _make(path.parent) and not os.path.lexists(path):
                path.symlink_to(root.joinpath(*target_place, target))
        left_out = LeftOut()
        sources = find_sources([f"file://{root}" if by_url else root], left_out=left_out)
        read = [os.path.realpath(file.path) for source in sources for file in source.files]
        assert len(read) == len(set(read))
        visible, dead = visible_files(root)
        wanted = {file for file, names in visible.items() if any(kind_of(Path(name)) for name in names)}
        assert set(read) == wanted
        assert left_out.files["links to nothing, and what is no file"] == dead
        counted = documents(sources)
        for file, rows in written.items():
            if file in visible and rows is not None:
                assert counted[file] == rows


# Parquet schemas.

INTS = st.integers(-3, 300)
TEXTS = st.one_of(st.text(max_size=5), st.sampled_from(["", "\ud7ff", "a\n\nb"]))
COLUMNS = {
    pa.string(): TEXTS,
    pa.large_string(): TEXTS,
    pa.binary(): st.binary(max_size=4),
    pa.int8(): st.integers(-3, 100),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.sampled_from([0.0, 1.5, -2.0]),
    pa.bool_(): st.booleans(),
    pa.timestamp("us"): st.integers(0, 10**9),
    pa.dictionary(pa.int32(), pa.string()): TEXTS,
    pa.null(): st.none(),
    pa.list_(pa.int32()): st.lists(INTS, max_size=4),
    pa.list_(pa.int64()): st.lists(st.one_of(INTS, st.none(), st.just(2**40)), max_size=4),
    pa.large_list(pa.uint16()): st.lists(st.integers(0, 300), max_size=4),
    pa.list_(pa.bool_()): st.lists(st.booleans(), max_size=4),
    pa.list_(pa.string()): st.lists(st.one_of(TEXTS, st.none()), max_size=3),
    pa.list_(pa.int8(), 2): st.lists(st.integers(0, 9), min_size=2, max_size=2),
    pa.list_(pa.list_(pa.int32())): st.lists(st.lists(INTS, max_size=2), max_size=2),
    pa.struct([("input_ids", pa.list_(pa.int32())), ("text", pa.string())]): st.just({"input_ids": [1], "text": "a"}),
    pa.map_(pa.string(), pa.int32()): st.lists(st.tuples(TEXTS, INTS), max_size=2),
}
NAMES = ["text", "id", "input_ids", "labels", "cu_seqlens", "doc_ids", "attention_mask"]
NAMES += ["input_ids.length", "text.x", "", "Text", "position_ids", "é", "input_ids.list.element"]
BROKEN = pa.array([b"a", b"\xff", None]).view(pa.string())


@st.composite
def tables(draw, first: str, kinds: list) -> pa.Table:
    """Some columns, most often with one ``first`` of a type that is understood."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4))
    if draw(st.integers(0, 4)):
        names = [name for name in dict.fromkeys(names) if name not in (first, "position_ids")]
        names.insert(draw(st.integers(0, len(names))), first)
    rows = draw(st.integers(0, 4))
    columns = []
    for name in names:
        lists = name in ("input_ids", "labels", "cu_seqlens", "attention_mask")
        usual = kinds if name == first else [pa.list_(pa.int32())] if lists else list(COLUMNS)
        kind = draw(st.sampled_from(usual if draw(st.integers(0, 4)) else list(COLUMNS)))
        values = COLUMNS[kind] if draw(st.booleans()) else st.one_of(COLUMNS[kind], st.none())
        column = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind)
        if kind == pa.string() and rows == len(BROKEN) and not draw(st.integers(0, 3)):
            column = BROKEN
        columns.append(column)
    return pa.Table.from_arrays(columns, names)


def write_parquet(data, table: pa.Table, file: Path) -> None:
    if not table.num_columns:
        table = pa.table({"other": pa.array([1])})
    pq.write_table(table, file, row_group_size=data.draw(st.integers(1, 5)), write_statistics=data.draw(st.booleans()))


@EXAMPLES
@given(st.data(), tables("text", [pa.string(), pa.large_string()]))
def test_every_row_of_a_parquet_file_is_a_document_or_malformed(data, table):
    with tempfile.TemporaryDirectory() as folder, refused():
        file = Path(folder, "a.parquet")
        write_parquet(data, table, file)
        assert sum(documents(find_sources([Path(folder)])).values()) == table.num_rows
        first_malformed(str(file), KEYS)


@EXAMPLES
@given(st.data(), tables("input_ids", [pa.list_(pa.int32()), pa.list_(pa.int64()), pa.large_list(pa.uint16())]))
def test_a_token_table_is_read_exactly_or_refused(data, table):
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(data, table, Path(folder, "a.parquet"))
        with refused():
            opened = Table.open(folder)
            opened.check_trainable()
            ids = [opened.read(group, 301).input_ids.tolist() for group in range(len(opened.row_groups))]
            read = [token for group in ids for token in group]
            assert read == [token for row in table.column("input_ids").to_pylist() for token in row]
            assert opened.tokens == len(read)
        with refused():
            Table.open(folder)
            for batch in table.to_batches():
                lists = token_lists(batch, "a.parquet")
                named = doc_ids(batch, lists_to_bytes(lists["input_ids"], "a.parquet"), "a.parquet")
                assert len(named) == len(lists["input_ids"]) == batch.num_rows
                assert all(name and None not in name for name in named.to_pylist())
