"""From a step to its documents and back."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import read_sample

from fft.data import trace
from fft.data.blend import Blend
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.data.trace import documents_of_step, steps_of_document
from fft.errors import UserError


def write(folder, row_count, number):
    """Rows of up to 3 documents, the first of that number; tokens count on from 100 times the document's number."""
    rng = np.random.default_rng(number)
    rows, bounds, names = [], [], []
    for _ in range(row_count):
        lengths = rng.integers(1, 6, rng.integers(1, 4))
        rows.append(np.concatenate([100 * (number + k) + np.arange(n) for k, n in enumerate(lengths)]).astype(np.int32))
        bounds.append([0, *np.cumsum(lengths).tolist()])
        names.append([f"d{number + k}" for k in range(len(lengths))])
        number += len(lengths)
    table = pa.table(
        {
            "input_ids": pa.array(rows, pa.list_(pa.int32())),
            "cu_seqlens": pa.array(bounds, pa.list_(pa.int32())),
            "doc_ids": names,
        }
    )
    pq.write_table(table, folder / "part-0.parquet", row_group_size=7)
    return rows


@pytest.fixture(scope="module", params=["rows", "cut", "best-fit"])
def reader(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rows = write(folder, 40, 0)
    if request.param == "rows":
        size = (folder / "part-0.parquet").stat().st_size
        total = sum(map(len, rows))
        commit(folder, Manifest((FileInfo("part-0.parquet", 40, total, size),), 40, total, seq_len=16))
    pack = "cut" if request.param == "rows" else request.param
    return SampleReader(Table.open(folder), 16, seed=5, pack=pack)


def test_what_is_traced_is_what_was_trained_on(reader):
    total = 2 * reader.samples_per_epoch
    back = {}
    for step in range(1, -(-total // 4) + 1):
        seen = list(documents_of_step(reader, step, 4))
        assert {s.step for s in seen} == {step}
        for sample in {s.sample for s in seen}:
            ids = [100 * int(s.doc_id[1:]) + t for s in seen if s.sample == sample for t in range(s.start, s.stop)]
            assert read_sample(reader, sample).input_ids[: len(ids)].tolist() == ids
        for s in seen:
            if s.epoch < 2:
                back.setdefault(s.doc_id, set()).add(s)
    for name, expected in back.items():
        assert set(steps_of_document(reader, name, 4, epochs=2)) == expected
    assert {s.epoch for s in back["d0"]} == {0, 1}


@pytest.mark.parametrize("end", ["repeat", "drop"])
def test_documents_of_a_blend_are_traced_both_ways(end, tmp_path_factory):
    readers = []
    for part, rows in enumerate((15, 40)):
        folder = tmp_path_factory.mktemp("part")
        write(folder, rows, 1000 * part)
        readers.append(SampleReader(Table.open(folder), 16, seed=5))
    blend = Blend(readers, [0.6, 0.4], end)
    total = 2 * blend.samples_per_epoch
    seen = [s for step in range(1, -(-total // 4) + 1) for s in documents_of_step(blend, step, 4) if s.sample < total]
    back = {}
    for s in seen:
        back.setdefault(s.doc_id, []).append(s)
    assert {"d0", "d1000"} <= back.keys()
    for name, expected in back.items():
        found = list(steps_of_document(blend, name, 4, epochs=2))
        assert sorted(found, key=repr) == sorted(expected, key=repr)
    with pytest.raises(UserError, match="holds no document with the id 'nowhere'"):
        list(steps_of_document(blend, "nowhere", 4, 1))


def test_what_cannot_be_found_is_named(reader, tmp_path):
    with pytest.raises(UserError, match="no document with the id 'nowhere'"):
        list(steps_of_document(reader, "nowhere", 4, 1))
    pq.write_table(pa.table({"input_ids": pa.array([[1, 2]], pa.list_(pa.int32()))}), tmp_path / "a.parquet")
    foreign = SampleReader(Table.open(tmp_path), 2, 0)
    with pytest.raises(UserError, match="no column doc_ids"):
        list(steps_of_document(foreign, "a", 1, 1))
    assert [(s.doc_id, s.start, s.stop) for s in documents_of_step(foreign, 1, 1)] == [("", 0, 2)]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["7", "ab", None]),
        pa.array([7, 8, None]),
        pa.array([[7], [8], None], pa.large_list(pa.int64())),
        pa.array([["7"], ["ab"], []]),
        pa.array([["7"], ["ab", "c", "d"], [None]]),  # not an id a document: all have the first
    ],
    ids=str,
)
def test_ids_are_found_in_every_form_that_the_jobs_read(tmp_path, ids):
    rows, bounds = pa.array([[1, 2], [3, 4], [5, 6]]), pa.array([[0, 2], [0, 1, 2], [0, 2]])
    pq.write_table(pa.table({"input_ids": rows, "cu_seqlens": bounds, "doc_ids": ids}), tmp_path / "a.parquet")
    reader = SampleReader(Table.open(tmp_path), 2, 0)
    seen = list(documents_of_step(reader, 1, 3))
    second = "8" if "int" in str(ids.type) else "ab"
    assert sorted((s.row, s.start, s.stop, s.doc_id) for s in seen) == [
        (0, 0, 2, "7"),
        (1, 0, 1, second),
        (1, 0, 1, second),
        (2, 0, 2, ""),
    ]
    for name in ("7", second):
        found = steps_of_document(reader, name, 3, 1)
        assert sorted(found, key=repr) == sorted((s for s in seen if s.doc_id == name), key=repr)


def test_a_document_without_tokens_takes_no_name_from_others(tmp_path):
    bounds = pa.array([[0, 0, 1, 1, 2, 2]])
    table = {"input_ids": pa.array([[3, 4]]), "cu_seqlens": bounds, "doc_ids": [["a", "b", "c", "d", "e"]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    reader = SampleReader(Table.open(tmp_path), 2, 0)
    seen = list(documents_of_step(reader, 1, 1))
    assert [(s.start, s.stop, s.doc_id) for s in seen] == [(0, 1, "b"), (0, 1, "d")]
    assert list(steps_of_document(reader, "d", 1, 1)) == seen[1:]


def test_a_column_that_holds_no_ids_is_named(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1, 2]], "doc_ids": [b"ab"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column doc_ids is binary, it must be a list of strings"):
        list(documents_of_step(SampleReader(Table.open(tmp_path), 2, 0), 1, 1))


def test_the_command(reader):
    flags = ["--train_data", reader.table.path, "--seq_len", "16", "--seed", "5", "--global_batch", "4"]
    flags += ["--pack", "best-fit" if reader.pack == "best-fit" else "cut"]
    command = [sys.executable, "-m", "fft.data.trace", *flags]
    lines = subprocess.run([*command, "--step", "2"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split("\t")[:4] == ["step", "sample", "epoch", "dataset"]
    assert [line.split("\t")[4] for line in lines[1:]] == [s.doc_id for s in documents_of_step(reader, 2, 4)]
    none = subprocess.run([*command, "--step", "0"], capture_output=True, text=True, check=False)
    assert (none.returncode, none.stderr) == (2, "error: --step 0 must be at least 1.\n")


def test_a_single_file_of_any_name_is_read_where_it_is_parquet(tmp_path, monkeypatch, capsys):
    write(tmp_path, 20, 0)
    table, text = (tmp_path / "part-0.parquet").rename(tmp_path / "part-0"), tmp_path / "chats.jsonl"
    text.write_text('{"text": "a"}\n')
    for path in (table, text):
        argv = ["trace", "--train_data", path, "--seq_len", 8, "--global_batch", 1, "--step", 1]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        if path == table:
            trace.main()
            assert len(capsys.readouterr().out.splitlines()) > 1
        else:
            with pytest.raises(UserError, match=r"chats\.jsonl is no table: give the one that the run made of it"):
                trace.main()
