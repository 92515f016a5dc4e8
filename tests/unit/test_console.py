"""What the jobs show."""

import threading

import pytest

from fft.console import format_table, live, progress, progress_line


def test_a_table_is_aligned():
    text = format_table(("name", "rows"), [["a", 1234], ["long name", 5.5]])
    assert text.splitlines() == ["name        rows", "---------  -----", "a          1,234", "long name   5.50"]


def test_a_progress_line_has_what_is_done_and_the_time_left():
    assert progress_line("x", 3, 1200, 6) == "x: 3 of 1,200 tasks, 2,394 s left"
    assert progress_line("x", 0, 4, 2) == "x: 0 of 4 tasks, 2 s so far"
    assert progress_line("x", 0, 0, 2) == "x: 2 s so far"


def test_progress_shows_how_many_tasks_have_ended(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = ""
    with progress("job", lambda: (1, 2), interval=0.01):
        while "job: 1 of 2 tasks" not in shown:
            shown += capsys.readouterr().err


@pytest.mark.parametrize("tty", [True, False])
def test_a_live_line_is_rewritten_or_repeated_and_may_stay(tty, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty)
    shown = threading.Event()

    def line(seconds):
        shown.set()
        return f"{seconds >= 0} ok"

    with live(line, last=True, interval=0.01):
        assert shown.wait(300) is tty if tty else not shown.wait(0.1)
    said = capsys.readouterr().err
    assert said.startswith("\rTrue ok\x1b[K") is tty
    assert said.endswith("\r\x1b[KTrue ok\n" if tty else "True ok\n")


def test_a_live_line_goes_with_an_error(capsys):
    count = threading.active_count()
    with pytest.raises(ZeroDivisionError), live(lambda seconds: "half", last=True):
        raise ZeroDivisionError
    assert threading.active_count() == count
    assert capsys.readouterr().err == ""
