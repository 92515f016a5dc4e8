"""What the jobs show."""

from spark_jobs.summary import format_table, progress, progress_line, written_bytes


def test_a_table_is_aligned():
    text = format_table(("name", "rows"), [["a", 1234], ["long name", 5.5]])
    assert text.splitlines() == ["name        rows", "---------  -----", "a          1,234", "long name   5.50"]


def test_a_progress_line_has_rate_and_time_left():
    assert progress_line("x", 6_000_000, 12_000_000, 2) == "x: 6.0 of about 12.0 MB written, 3.0 MB/s, 2 s left"
    assert progress_line("x", 0, 12_000_000, 2) == "x: 0.0 of about 12.0 MB written, 0.0 MB/s, 2 s so far"


def test_progress_counts_what_lies_below_the_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary/part.parquet").write_bytes(b"x" * 1000)
    assert written_bytes(tmp_path) == 1000
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = ""
    with progress("job", tmp_path, 2000, interval=0.01):
        while "job: 0.0 of about" not in shown:
            shown += capsys.readouterr().err
