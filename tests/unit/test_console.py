"""What the jobs show."""

import threading

import pytest

from fft.console import format_table, live, progress, progress_line
from fft.data.worker_notes import Amount, WorkerNotes


def test_a_table_is_aligned():
    text = format_table(("name", "rows"), [["a", 1234], ["long name", 5.5]])
    assert text.splitlines() == ["name        rows", "---------  -----", "a          1,234", "long name   5.50"]


def test_a_progress_line_has_rate_and_time_left():
    nothing, half = Amount(), Amount(10, 6_000_000, 2)
    line = progress_line("x", nothing, half, 4, None, 2)
    assert line == "x: 10 rows, 6.0 M tokens written, 3.0 M tokens/s, 2 s left"
    line = progress_line("x", half, nothing, 4, 12_000_000, 2)
    assert line == "x: 10 rows, 6.0 of 12.0 M tokens read, 3.0 M tokens/s, 6 s left"
    line = progress_line("x", Amount(20, 12_000_000, 0), half, 4, 12_000_000, 3)
    assert line == "x: 10 rows, 6.0 of 12.0 M tokens written, 2.0 M tokens/s, 1 s left"
    line = progress_line("x", nothing, nothing, 4, None, 2)
    assert line == "x: 0 rows, 0.0 M tokens written, 0.0 M tokens/s, 2 s so far"


def test_progress_shows_what_tasks_note(tmp_path, monkeypatch, capsys):
    notes = WorkerNotes(str(tmp_path))
    notes.meter("written").add(5, 2_000_000, parts=1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = ""
    with progress("job", notes, parts=2, interval=0.01):
        while "job: 5 rows, 2.0 M tokens written" not in shown:
            shown += capsys.readouterr().err


@pytest.mark.parametrize("tty", [True, False])
def test_a_live_line_is_rewritten_or_repeated_and_may_stay(tty, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty)
    shown = threading.Event()

    def line(seconds):
        shown.set()
        return f"{seconds >= 0} ok"

    with live(line, last=True, interval=0.01):
        assert shown.wait(5) is tty if tty else not shown.wait(0.1)
    said = capsys.readouterr().err
    assert said.startswith("\rTrue ok\x1b[K") is tty
    assert said.endswith("\r\x1b[KTrue ok\n" if tty else "True ok\n")


def test_a_live_line_goes_with_an_error(capsys):
    count = threading.active_count()
    with pytest.raises(ZeroDivisionError), live(lambda seconds: "half", last=True):
        raise ZeroDivisionError
    assert threading.active_count() == count
    assert capsys.readouterr().err == ""
