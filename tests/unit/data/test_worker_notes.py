"""What workers tell the driver: one error is heard."""

import pyarrow as pa
import pytest

from fft.data.worker_notes import Stoppable, WorkerNotes
from fft.errors import StorageError, UserError

BATCHES = [pa.RecordBatch.from_pydict({"x": [i]}) for i in range(3)]


def fails_at_second(batches):
    yield next(batches)
    raise UserError(f"row {next(batches)['x'][0].as_py()} is bad.")


def test_the_first_error_is_the_jobs(tmp_path):
    notes = WorkerNotes(str(tmp_path))
    source = iter(BATCHES)
    assert list(Stoppable(fails_at_second, notes)(source)) == BATCHES[:1]
    assert next(source, None) is None  # taken to its end
    notes.fail(UserError("another"))
    with pytest.raises(UserError, match=r"^row 1 is bad\.$"):
        notes.check()
    notes.check()  # said once


def test_tasks_that_begin_later_do_nothing(tmp_path):
    notes = WorkerNotes(str(tmp_path), "-1")
    notes.fail(UserError("bad"))
    source = iter(BATCHES)
    assert list(Stoppable(lambda batches: batches, notes)(source)) == []
    assert next(source, None) is None
    assert list(Stoppable(lambda batches: batches, WorkerNotes(str(tmp_path), "-2"))(iter(BATCHES))) == BATCHES


def test_without_room_for_the_error_the_task_fails(tmp_path):
    with pytest.raises(UserError, match="row 1 is bad"):
        list(Stoppable(fails_at_second, WorkerNotes(str(tmp_path / "gone")))(iter(BATCHES)))


def test_what_a_storage_does_not_do_fails_the_task_which_is_tried_again(tmp_path):
    def fails(batches):
        raise StorageError("busy")

    notes = WorkerNotes(str(tmp_path))
    with pytest.raises(StorageError, match="busy"):
        list(Stoppable(fails, notes)(iter(BATCHES)))
    assert not notes.failed()


def test_a_worker_that_does_not_see_the_jobs_mark_says_so(tmp_path):
    notes = WorkerNotes(str(tmp_path), seen="mark")
    with pytest.raises(
        StorageError, match=r"a worker on .* does not find .*/mark, the mark of this job: `output` must"
    ):
        list(Stoppable(lambda batches: batches, notes)(iter(BATCHES)))
    (tmp_path / "mark").touch()
    assert list(Stoppable(lambda batches: batches, notes)(iter(BATCHES))) == BATCHES
