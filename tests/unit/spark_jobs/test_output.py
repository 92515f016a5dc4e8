"""An output at every point where its job may be killed, and with another job beside it: no finished table is lost.

Parts are written here without Spark, as tasks would write them.
"""

import multiprocessing
import os
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data import delta
from fft.data.commits import begin_replacing
from fft.data.manifest import WRITING_NAME, Manifest, read_manifest
from fft.data.owner import OWNER_NAME, Occupied
from fft.data.part_files import QUARANTINE, PartFile, RejectFile
from fft.data.table import Table
from fft.errors import UserError
from spark_jobs.token_table.output import Output

SINGLE, SPLIT = ("",), ("validation", "train")
#: One point in so many is tried, all with FFT_KILLS; where to begin changes from case to case.
STEP = 1 if "FFT_KILLS" in os.environ else 4
#: What the driver does to files; each is announced before it happens.
TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.utime"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is killed here is a process, not the machine: nothing has to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def rows(first: int) -> pa.RecordBatch:
    """Three rows of ids that tell which job wrote them."""
    return pa.record_batch({"input_ids": pa.array([[first] * n for n in (1, 2, 3)], pa.list_(pa.int32()))})


def run(out: Path, names: tuple[str, ...], first: int, table_format: str = "parquet", overwrite: bool = True) -> None:
    """A job that writes two parts a table, and sets a record aside."""
    claim(Output(out, names, [], overwrite, table_format), first)


def claim(output: Output, first: int, meanwhile=lambda: None) -> None:
    """The same, and what happens before it publishes them."""
    with output.claim({"job": "test"}) as writers:
        for writer in writers.values():
            write(writer, first)
        meanwhile()


def write(writer, first: int) -> None:
    parts = []
    for part in range(2):
        with PartFile(writer.target, part) as failed:  # a try of which nobody is told
            failed.write(rows(first))
            failed.finish({})
        with PartFile(writer.target, part) as sink, RejectFile(writer.target, part) as rejects:
            sink.write(rows(first))
            rejects.add("a.jsonl", "no text", b"{}")
            parts.append(sink.finish({}, rejects.finish()))
    writer.add(parts)
    files = writer.files
    manifest = Manifest(files, sum(f.rows for f in files), sum(f.tokens for f in files), lineage={"first": first})
    writer.finish(manifest, f"made of {first}")


def spark_writes(out: Path, first: int) -> None:
    """A table without a manifest, as ``df.write.parquet`` leaves it."""
    out.mkdir()
    pq.write_table(pa.Table.from_batches([rows(first)]), out / "part-00000-3bc41a-c000.snappy.parquet")
    (out / "_SUCCESS").touch()


def content(folder: Path) -> int | None:
    """What number a table's ids are, all of them read; None if there is no finished table."""
    try:
        table = Table.open(folder)
    except UserError:
        return None
    ids = {i for group in range(len(table.row_groups)) for i in table.read(group).input_ids.tolist()}
    assert table.tokens in (6, 12)
    (first,) = ids
    return first


def contents(out: Path, names: tuple[str, ...]) -> set[int | None]:
    return {content(out / name) for name in names}


def killed(point: int, job, out: Path) -> bool:
    """Run a job in a child that dies, as by kill -9, before the ``point``-th time it touches a file below ``out``."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return code == 9
    left = point

    def dies(event, arguments):
        nonlocal left
        if event in TOUCHES and str(arguments[0]).startswith(str(out)):
            writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            left -= bool(writes)
            if left < 0:
                os._exit(9)

    sys.addaudithook(dies)
    try:
        job()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def first_job(kind, out: Path) -> tuple[str, ...]:
    """Let something be there; its tables."""
    if kind == "foreign":
        spark_writes(out, 1)
        return SINGLE
    if kind is not None:
        run(out, kind, 1)
    return kind or ()


@pytest.mark.parametrize("new", [SINGLE, SPLIT], ids=["single", "split"])
@pytest.mark.parametrize("old", [None, SINGLE, SPLIT, "foreign"], ids=["none", "single", "split", "foreign"])
def test_killed_anywhere_the_old_table_or_the_new_is_there(old, new, tmp_path):
    kept, point, seen = None, len(str(old)) % STEP, set()
    while True:
        out = tmp_path / str(point)
        kept = first_job(old, out)
        alive = not killed(point, lambda out=out: run(out, new, 2), out)
        found = contents(out, new)
        if old is not None and found != {2}:
            assert contents(out, kept) in ({1}, {1, 2}), point  # two tables change places one after the other
        seen |= found
        if alive:
            break
        if old is None and found == {None}:
            run(out, new, 3, overwrite=False)  # the same command again
        else:
            with pytest.raises(UserError, match="exists: give"):
                run(out, new, 3, overwrite=False)
            run(out, new, 3)
        check_tidy(out, new, 3)
        point += STEP
    assert {2, None if kept != new else 1} <= seen
    assert point > 20
    check_tidy(out, new, 2)


def check_tidy(out: Path, names: tuple[str, ...], first: int) -> None:
    """Nothing lies there but the tables of one job."""
    assert contents(out, names) == {first}
    assert {p.name for p in out.iterdir() if p.is_dir()} == set(names) - {""} or QUARANTINE
    for name in names:
        files = {path.name for path in (out / name).iterdir()} - {*SPLIT}
        parts = {file.path for file in read_manifest(out / name).files}
        assert files == parts | {QUARANTINE, "_fft_manifest.json", "_data.info"}
        assert (out / name / "_data.info").read_text() == f"made of {first}"
        assert {p.stem for p in (out / name / QUARANTINE).iterdir()} == {Path(part).stem for part in parts}
    assert not list(out.rglob("*.writing"))


def in_child(job) -> None:
    """What uses deltalake cannot be forked afterwards."""
    assert not killed(10**9, job, Path("/none"))


def every_point_of_delta(folder: Path, old: int | None) -> int:
    """In a process that never uses deltalake itself; how many points there were."""
    os.fsync = lambda descriptor: None
    alive, point = False, 0
    while not alive:
        out = folder / str(point)
        if old:
            in_child(lambda out=out: run(out, SINGLE, old, "delta"))
        alive = not killed(point, lambda out=out: run(out, SINGLE, 2, "delta"), out)
        in_child(lambda out=out, alive=alive: check_delta(out, [2] if alive else [2, old]))
        point += STEP
    return point


def check_delta(out: Path, expected: list[int | None]) -> None:
    assert content(out) in expected
    run(out, SINGLE, 3, "delta")
    assert content(out) == 3
    assert not list(out.rglob("*.writing"))
    assert not (out / WRITING_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, 1], ids=["none", "delta"])
def test_killed_anywhere_a_delta_table_has_its_version(old, tmp_path):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(every_point_of_delta, tmp_path, old).result() > 20


@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_a_job_that_fails_removes_its_own_files_alone(table_format, tmp_path):
    out = tmp_path / "out"

    def no_room(before):
        assert content(out) == before
        raise UserError("no room")

    for before in (None, 1):
        lying = sorted(out.rglob("*"))
        with pytest.raises(UserError, match="no room"):
            claim(Output(out, SINGLE, [], True, table_format), 2, partial(no_room, before))
        assert sorted(out.rglob("*")) == lying
        assert content(out) == before
        run(out, SINGLE, 1, table_format)


@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_a_second_job_is_refused_while_the_first_lives(table_format, tmp_path):
    out = tmp_path / "out"
    for round_ in (1, 2):
        with Output(out, SINGLE, [], True, table_format).claim({}) as writers:
            for overwrite in (False, True):
                with pytest.raises(Occupied, match=rf"`output` {out} is being written by another job: process "):
                    Output(out, SINGLE, [], overwrite, table_format).check()
                with pytest.raises(Occupied, match="If it is dead, this one takes over"):
                    run(out, SINGLE, 9, table_format, overwrite)
            with pytest.raises(Occupied, match=r"which `output` .*train overlaps, is being written"):
                Output(out / "train", SINGLE, [], True, table_format).check()
            write(writers[""], round_)
        assert content(out) == round_
        assert not (out / OWNER_NAME).exists()


def test_a_job_on_one_of_the_tables_keeps_others_from_the_folder_of_both(tmp_path):
    out = tmp_path / "out"
    with Output(out / "train", SINGLE, [], False, "parquet").claim({}) as writers:
        with pytest.raises(Occupied, match=r"out/train, which `output` .*out overlaps, is being written"):
            Output(out, SPLIT, [], True, "parquet").check()
        write(writers[""], 1)


def test_what_another_job_has_finished_since_the_look_before_the_work_stays(tmp_path, monkeypatch):
    """Both have looked when nothing was there; starting an engine takes seconds."""
    out = tmp_path / "out"
    second = Output(out, SINGLE, [], False, "parquet")
    second.check()
    run(out, SINGLE, 1, overwrite=False)
    monkeypatch.setattr(Output, "check", lambda self: None)
    with pytest.raises(UserError, match="exists: give `overwrite=True`"):
        claim(second, 2)
    check_tidy(out, SINGLE, 1)


def test_what_a_dead_job_has_left_is_gone_before_the_work(tmp_path):
    """It may be what the disk lacks; and if this job fails as well, the old table is as it was."""
    out, dead = tmp_path / "out", "-" + "0" * 12
    run(out, SINGLE, 1)
    before = sorted(path.name for path in out.iterdir())
    begin_replacing(out, {}, f"{dead}.parquet")
    (out / f"part-00000{dead}.parquet").write_bytes(b"published")
    (out / f".part-00001{dead}.1.writing").write_bytes(b"half")

    def no_room():
        assert not list(out.glob(f"*{dead}*"))
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        claim(Output(out, SINGLE, [], True, "parquet"), 2, no_room)
    assert sorted(path.name for path in out.iterdir()) == before
    check_tidy(out, SINGLE, 1)


def test_two_jobs_at_once_and_one_of_them_writes(tmp_path):
    """Thirty that start together: each is done or refused, and the table is that of the last."""
    said, done = [], []

    def job(number):
        try:
            run(tmp_path / "out", SINGLE, number)
            done.append(number)
        except Occupied as error:
            said.append(error)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(1, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) + len(done) == 30
    assert content(tmp_path / "out") == done[-1]


def test_a_job_that_was_taken_over_stops(tmp_path):
    """As one that stood still for minutes on another machine: the mark is no longer its own."""
    out = tmp_path / "out"

    def taken_over():
        (out / OWNER_NAME).unlink()
        run(out, SINGLE, 2)

    with pytest.raises(UserError, match="was taken over by another job while this one stood still"):
        claim(Output(out, SINGLE, [], False, "parquet"), 1, taken_over)
    check_tidy(out, SINGLE, 2)


def test_what_is_appended_to_a_delta_table_meanwhile_is_not_lost(tmp_path):
    out = tmp_path / "out"
    run(out, SINGLE, 1, "delta")
    output = Output(out, SINGLE, [], True, "delta")
    output.check()  # the job begins
    append(out, 7)
    with pytest.raises(
        UserError, match=r"another writer committed version 1 while this job ran \(version 0 was the la"
    ):
        claim(output, 2)
    table = Table.open(out)
    assert (table.version, table.tokens) == (1, 18)
    with pytest.raises(UserError, match="another writer committed version 2"):  # and at the last moment
        claim(Output(out, SINGLE, [], True, "delta"), 2, partial(append, out, 8))
    assert Table.open(out).tokens == 24
    run(out, SINGLE, 3, "delta")
    assert content(out) == 3


def append(out: Path, first: int) -> None:
    """What another program adds to a Delta table, which is made if it is not there."""
    deltalake.write_deltalake(str(out), pa.Table.from_batches([rows(first)]), mode="append")


def test_a_delta_table_that_somebody_makes_meanwhile_is_not_lost(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"another writer committed version 0 while this job ran \(there was no table"):
        claim(Output(out, SINGLE, [], False, "delta"), 2, partial(append, out, 7))
    assert content(out) == 7


def test_a_commit_from_a_stale_version_is_refused_by_the_log_itself(tmp_path, monkeypatch):
    """Between the last look and the commit."""
    out = tmp_path / "out"
    run(out, SINGLE, 1, "delta")

    def commits(folder, *what):
        append(folder.root, 7)
        return delta.commit_delta(folder, *what)

    monkeypatch.setattr("spark_jobs.token_table.output.commit_delta", commits)
    with pytest.raises(UserError, match="another writer committed version 1"):
        run(out, SINGLE, 2, "delta")
    assert Table.open(out).tokens == 18


def test_while_a_table_is_replaced_readers_have_the_old_one(tmp_path):
    """Also one that Spark wrote, and when the new files have their names already."""
    for kind in ("foreign", SINGLE, SPLIT):
        out = tmp_path / str(kind)
        names = first_job(kind, out)
        with Output(out, SINGLE, [], True, "parquet").claim({}) as writers:
            write(writers[""], 2)
            assert contents(out, names) == {1}
            writers[""].publish()
            assert contents(out, names) == {1}
            writers[""].publish = lambda: None
        assert content(out) == 2


def test_a_table_below_another_does_not_cost_that(tmp_path):
    run(tmp_path / "out", SINGLE, 1)
    run(tmp_path / "out" / "more", SINGLE, 2)
    assert (content(tmp_path / "out"), content(tmp_path / "out" / "more")) == (1, 2)


def test_a_finished_table_whose_job_was_interrupted_while_it_replaced_it_needs_overwrite(tmp_path):
    out = tmp_path / "out"
    run(out, SINGLE, 1)
    (out / WRITING_NAME).write_text("{}")  # of an older release
    with pytest.raises(UserError, match="exists: give `overwrite=True`"):
        run(out, SINGLE, 2, overwrite=False)
    assert content(out) == 1


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`output` .*file/out lies below the file .*file: give a folder"):
        Output(tmp_path / "file" / "out", SINGLE, [], False, "parquet").check()
    with pytest.raises(UserError, match=r"`output` .*file is the file .*file: give a folder"):
        Output(tmp_path / "file", SINGLE, [], False, "parquet").check()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"`output` .*none cannot be written to: /.* does not permit it"):
        Output(tmp_path / "none", SINGLE, [], False, "parquet").check()
