"""Errors of workers: one is heard, the rest of the job does nothing."""

import pyarrow as pa
import pytest

from fft.errors import UserError
from spark_jobs.stopping import Stop, Stoppable

BATCHES = [pa.RecordBatch.from_pydict({"x": [i]}) for i in range(3)]


def fails_at_second(batches):
    yield next(batches)
    raise UserError(f"row {next(batches)['x'][0].as_py()} is bad.")


def test_the_first_error_is_the_jobs(tmp_path):
    stop = Stop(str(tmp_path / "stop"))
    source = iter(BATCHES)
    assert list(Stoppable(fails_at_second, stop)(source)) == BATCHES[:1]
    assert next(source, None) is None  # taken to its end
    stop.write(UserError("another"))
    with pytest.raises(UserError, match=r"^row 1 is bad\.$"):
        stop.check()
    stop.check()  # said once


def test_tasks_that_begin_later_do_nothing(tmp_path):
    stop = Stop(str(tmp_path / "stop"))
    stop.write(UserError("bad"))
    source = iter(BATCHES)
    assert list(Stoppable(lambda batches: batches, stop)(source)) == []
    assert next(source, None) is None


def test_without_room_for_the_file_the_task_fails(tmp_path):
    with pytest.raises(UserError, match="row 1 is bad"):
        list(Stoppable(fails_at_second, Stop(str(tmp_path / "gone" / "stop")))(iter(BATCHES)))
