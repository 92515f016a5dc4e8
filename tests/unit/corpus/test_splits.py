"""Inputs cut into splits: every record exactly once, wherever the cuts fall."""

import bz2
import gzip
import itertools
import re
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.corpus.readers import read_documents, read_lines
from fft.corpus.splits import FEWEST_PARTS, MOST_PARTS, PART_BYTES, PART_FILES, Span, Split, chunk_size, cut_text, deal
from fft.data.part_files import ROW_GROUP_ROWS, PartFile, PartFolder
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from spark_jobs.runtime.tasks import by_part

text_ = st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\n\n", b"\r\n", b"x" * 40]), max_size=60).map(b"".join)


def in_pieces(read, path: Path, pieces_of: int) -> list[bytes]:
    spans = cut_text("d", "text", str(path), path.stat().st_size, pieces_of)
    return [record for span in spans for record in read(span.path, span.start, span.stop)]


@settings(max_examples=300, deadline=None)
@given(text_, st.integers(1, 30))
def test_every_line_once(text, pieces_of):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(text)
        expected = [line.rstrip(b"\r\n") for line in text.split(b"\n")]
        expected = expected[:-1] if text.endswith(b"\n") or not text else expected
        assert in_pieces(read_lines, path, pieces_of) == expected


@settings(max_examples=300, deadline=None)
@given(text_, st.integers(1, 30))
def test_every_document_once(text, pieces_of):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(text)
        whole = list(read_documents(str(path), 0, 0))
        assert in_pieces(read_documents, path, pieces_of) == whole
        assert [d.strip() for d in whole if d.strip()] == [
            d.strip() for d in re.split(rb"\n(?:[ \t]*\r?\n)+", text) if d.strip()
        ]


def test_documents_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("fft.corpus.readers._BLOCK", 7)
    documents = [b"one line\nand two", b"x" * 100, b"y"]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(documents) + b"\n")
    assert [d.strip() for d in read_documents(str(tmp_path / "a.txt"), 0, 0)] == documents
    for pieces_of in range(1, 120, 7):
        assert [d.strip() for d in in_pieces(read_documents, tmp_path / "a.txt", pieces_of)] == documents


DOCUMENT = st.sampled_from([b"a", b"  bc\nd", b"x" * 9])
BLANK = st.sampled_from([b"\n\n", b"\n\n\n", b"\r\n\r\n", b"\n \t\n", b"\n\r\n \n\n"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"bc\nd", b"x" * 9]), BLANK), min_size=1, max_size=8), st.integers(1, 30)
)
def test_a_separator_may_lie_over_the_edge_of_two_blocks(stretches, block):
    """Whatever the blocks, a run of blank lines is one separator: none of it begins the next document."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fft.corpus.readers._BLOCK", block)
        path = Path(folder) / "a.txt"
        path.write_bytes(b"".join(document + blank for document, blank in stretches))
        expected = [document for document, _ in stretches]
        assert [found.rstrip(b"\r") for found in read_documents(str(path), 0, 0)] == expected
        for pieces_of in (3, 7, 20):
            assert [found.rstrip(b"\r") for found in in_pieces(read_documents, path, pieces_of)] == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize(("read", "between"), [(read_lines, b"\n"), (read_documents, b"\n\n")])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, suffix, read, between):
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}[suffix]
    mark, path = "\ufeff".encode(), tmp_path / f"a{suffix}"
    path.write_bytes(pack(mark + between.join([b"one", mark + b"two", b"3"]) + between))
    assert list(read(str(path), 0, 0)) == [b"one", mark + b"two", b"3"]
    if not suffix:
        for pieces_of in range(1, 20):
            assert in_pieces(read, path, pieces_of) == [b"one", mark + b"two", b"3"]
    for text in (mark, b"", mark[:2]):
        path.write_bytes(pack(text))
        assert b"".join(read(str(path), 0, 0)) == (text if text == mark[:2] else b"")


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_files_of_several_members(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"1\n2\n") + compress(b"3\n"))
    assert list(read_lines(str(path), 0, 0)) == [b"1", b"2", b"3"]
    path.write_bytes(compress(b"1\n2\n" * 1000)[:-9])
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix} cannot be read .* is it whole"):
        list(read_lines(str(path), 0, 0))


def test_zstandard_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frames = [pa.compress(lines, codec="zstd", asbytes=True) for lines in (b"1\n2\n", b"3\n")]
    path.write_bytes(b"".join(frames))
    assert list(read_lines(str(path), 0, 0)) == [b"1", b"2", b"3"]
    path.write_bytes(frames[0][:-3])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read .* is it whole"):
        list(read_lines(str(path), 0, 0))


@given(st.lists(st.integers(0, 3 * PART_BYTES), min_size=1, max_size=40))
def test_parts_are_numbered_without_gaps_in_the_order_of_the_input(sizes):
    spans = [Span("d", "json", str(i), 0, 0, size) for i, size in enumerate(sizes)]
    splits = deal(spans)
    assert [split.path for split in splits] == [span.path for span in spans]
    numbers = [split.part for split in splits]
    assert numbers[0] == 0
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(numbers))
    loads = [sum(s for s, n in zip(sizes, numbers, strict=True) if n == part) for part in range(numbers[-1] + 1)]
    assert max(loads) <= chunk_size(sum(sizes)) + max(sizes)


def test_a_span_goes_to_the_part_in_which_its_middle_lies():
    """Parts of 100 bytes; all that a span says goes along, and a part that nothing falls into has no number."""
    sizes = [40, 59, 2, 300, 99, 300]
    spans = [Span(f"d{i}", "text", f"p{i}", 10 * i, 10 * i + 5, size, f"id{i}") for i, size in enumerate(sizes)]
    assert chunk_size(sum(sizes)) == 100
    splits = deal(spans)
    assert [split.part for split in splits] == [0, 0, 1, 2, 3, 4]
    for split, span in zip(splits, spans, strict=True):
        assert split == Split(split.part, span.dataset, span.kind, span.path, span.start, span.stop, span.doc_id)


def test_little_input_still_occupies_a_few_cores():
    spans = cut_text("d", "json", "a", 1000, chunk_size(1000))
    assert deal(spans)[-1].part + 1 == FEWEST_PARTS


def batch(lengths, part=0):
    ids = pa.array([list(range(n)) for n in lengths], pa.list_(pa.int32()))
    return pa.RecordBatch.from_arrays([pa.array([part] * len(lengths), pa.int32()), ids], ["part", "input_ids"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12))
def test_row_groups_do_not_depend_on_the_batches(batches):
    import pyarrow.parquet as pq

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("fft.data.part_files.ROW_GROUP_ROWS", 7)
        patch.setattr("fft.data.part_files.ROW_GROUP_TOKENS", 50)
        rows = [n for lengths in batches for n in lengths]
        written = []
        for pieces in (batches, [rows]):
            with PartFile(PartFolder(Path(folder), WorkerNotes(folder)), 0) as sink:
                for lengths in pieces:
                    sink.write(batch(lengths))
                written.append(sink.finish({}))
        first, second = written
        assert (first.rows, first.tokens) == (second.rows, second.tokens) == (len(rows), sum(rows))
        if rows:
            data = [(Path(folder) / part.name).read_bytes() for part in written]
            assert data[0] == data[1]
            file = pq.ParquetFile(Path(folder) / first.name)
            groups = [file.read_row_group(i).column("input_ids").to_pylist() for i in range(file.num_row_groups)]
            assert all(len(g) <= 7 and (len(g) == 1 or sum(map(len, g)) <= 50) for g in groups)
            assert [len(row) for g in groups for row in g] == rows
    assert ROW_GROUP_ROWS == 1024


def test_a_failed_part_leaves_nothing(tmp_path):
    with PartFile(PartFolder(tmp_path, WorkerNotes(str(tmp_path))), 0) as sink:
        sink.write(batch([3] * 2000))  # and is never finished
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_streams_of_parts():
    both = pa.RecordBatch.from_arrays(
        [pa.array([0, 2, 2], pa.int32()), pa.array([[1], [2], [3]])], ["part", "input_ids"]
    )
    seen = [(part, sum(b.num_rows for b in rows)) for part, rows in by_part(iter([batch([1, 1]), both, batch([5], 3)]))]
    assert seen == [(0, 3), (2, 2), (3, 1)]


def test_large_inputs_have_larger_parts_and_small_files_more_parts():
    """100 TB are some 20,000 parts, whatever the sizes of their files; no part opens more than 1,000 files."""
    assert chunk_size(100 << 40) == -(-(100 << 40) // MOST_PARTS)
    assert chunk_size(MOST_PARTS * PART_BYTES) == PART_BYTES
    spans = [Span("d", "parquet", str(i // 4), i % 4, i % 4 + 1, 1 << 30) for i in range(100_000)]
    assert deal(spans)[-1].part + 1 == pytest.approx(MOST_PARTS, rel=0.1)
    numbers = [split.part for split in deal([Span("d", "json", str(i), 0, 0, 30) for i in range(20_500)])]
    assert max(Counter(numbers).values()) == PART_FILES
    assert numbers == sorted(numbers)
    assert {*numbers} == {*range(numbers[-1] + 1)}
