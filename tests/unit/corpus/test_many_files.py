"""Inputs and tables of many files: footers are read once, many at a time, and no more than needed is kept of them."""

import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import TextKeys

import fft.corpus.files
import fft.data.footer
from fft.corpus.files import find_sources, spans_of
from fft.corpus.readers import footer_of
from fft.data.footer import each_of
from fft.data.table import Table
from fft.errors import UserError

FILES = 300


def copies(folder, columns) -> None:
    """Links to one file, which has names of its own."""
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "part-00000.parquet")
    for number in range(1, FILES):
        (folder / f"part-{number:05}.parquet").hardlink_to(folder / "part-00000.parquet")


def test_answers_come_in_order_and_wait_for_each_other_in_bounds(monkeypatch):
    monkeypatch.setattr(fft.data.footer, "_AHEAD", 50)
    asked: list[str] = []

    def ask(path: str) -> str:
        time.sleep(0.01)  # as a store that is far away
        asked.append(path)
        return path

    paths = [str(number) for number in range(200)]
    start, most = time.monotonic(), 0
    for number, answer in enumerate(each_of(ask, paths)):
        assert answer == paths[number]
        most = max(most, len(asked) - number)
    assert most <= 50
    assert time.monotonic() - start < 1.5  # 2 s one after the other
    assert list(each_of(ask, [])) == []


def test_each_footer_is_read_once(tmp_path, monkeypatch):
    copies(tmp_path / "texts", {"text": ["a", "b"]})
    read: list[str] = []
    monkeypatch.setattr(fft.corpus.files, "footer_of", lambda path: (read.append(path), footer_of(path))[1])
    sources = find_sources([tmp_path / "texts"])
    spans = spans_of(sources, TextKeys())
    assert [span.path for span in spans] == [file.path for file in sources[0].files]
    assert sorted(read) == [span.path for span in spans]


def test_a_table_of_many_files_names_the_one_that_is_none(tmp_path):
    copies(tmp_path / "t", {"input_ids": pa.array([[1], [2, 3]], pa.list_(pa.int32()))})
    table = Table.open(tmp_path / "t")
    assert (len(table.row_groups), table.tokens) == (FILES, 3 * FILES)
    assert [group.path for group in table.row_groups] == sorted(group.path for group in table.row_groups)
    broken = tmp_path / "t" / "part-00217.parquet"
    broken.unlink()
    broken.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00217\.parquet is no readable parquet file"):
        Table.open(tmp_path / "t")
