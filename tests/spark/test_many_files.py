"""Footers of many files are read by tasks: inputs and tables are what they are where the driver reads them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import TextKeys

from fft.corpus.files import find_sources, spans_of
from fft.data.table import Table
from fft.errors import UserError
from spark_jobs.runtime import many_files
from spark_jobs.runtime.many_files import EachByTasks


@pytest.fixture
def each(spark, monkeypatch):
    monkeypatch.setattr(many_files, "_FEW", 10)
    monkeypatch.setattr(many_files, "_FILES_OF_TASK", 7)
    return EachByTasks(lambda: spark)


def test_what_tasks_say_of_files_is_what_the_driver_says(each, tmp_path):
    for number in range(1, 40):
        texts = {"id": [f"{number} {row}" for row in range(number)], "text": ["a"] * number}
        (tmp_path / "texts").mkdir(exist_ok=True)
        pq.write_table(pa.table(texts), tmp_path / "texts" / f"a b {number}.parquet", row_group_size=5)
        (tmp_path / "tokens").mkdir(exist_ok=True)
        ids = pa.array([[row] * row for row in range(number)], pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": ids}), tmp_path / "tokens" / f"{number}.parquet", row_group_size=5)
    sources = find_sources([tmp_path / "texts"])
    assert spans_of(sources, TextKeys(), each) == spans_of(sources, TextKeys())
    assert Table.open(tmp_path / "tokens", each).row_groups == Table.open(tmp_path / "tokens").row_groups
    (tmp_path / "tokens" / "17.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"17\.parquet is no readable parquet file .* write it again or remove it\.$"):
        Table.open(tmp_path / "tokens", each)
