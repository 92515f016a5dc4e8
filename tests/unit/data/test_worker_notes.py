"""What workers tell the driver: one error is heard, and how far they are."""

import pyarrow as pa
import pytest

from fft.data.worker_notes import Amount, Stoppable, WorkerNotes
from fft.errors import UserError

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


def test_notes_are_summed_and_cleared(tmp_path):
    notes, other = WorkerNotes(str(tmp_path), "-1"), WorkerNotes(str(tmp_path), "-2")
    for meter in (notes.meter("read"), notes.meter("read"), notes.meter("written"), other.meter("read")):
        meter.add(3, 40)
        meter.add(1, 2, parts=1)
    assert notes.amount("read") == Amount(8, 84, 2)
    assert notes.amount("written") == Amount(4, 42, 1)
    (tmp_path / next(p.name for p in tmp_path.iterdir() if "-1.read" in p.name)).write_bytes(b"")  # while it is written
    assert notes.amount("read") == Amount(4, 42, 1)
    notes.clear()
    assert notes.amount("read") == Amount()
    assert other.amount("read") == Amount(4, 42, 1)


def test_a_task_that_cannot_note_goes_on(tmp_path):
    WorkerNotes(str(tmp_path / "gone")).meter("read").add(1, 1, parts=1)
