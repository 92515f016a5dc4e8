"""An output in a store, and on a mounted one: killed anywhere, beside another job, with tries that failed.

Parts are written here without Spark, as tasks would write them.
"""

import contextlib
import os
import re

import pytest
from failing_store import expiring, full
from object_store import refuse_like_a_mounted_store
from pyarrow.fs import FileType
from unit.spark_jobs.test_kept_parts import Interrupted, work_on
from unit.spark_jobs.test_output import SINGLE, SPLIT, rows, write

from fft.data import owner, store_owner
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME
from fft.data.owner import Occupied
from fft.data.part_files import QUARANTINE, PartFile
from fft.data.storage import Storage
from fft.data.store_owner import OWNERS
from fft.data.table import Table
from fft.errors import UserError
from spark_jobs.token_table.kept import FINISHED, waiting
from spark_jobs.token_table.output import Output

NAMES = re.compile(r"part-0000[01]-[0-9a-f]{8}-[0-9a-f]{12}\.parquet")
#: One point in so many is tried, all with FFT_KILLS, fewer in a store; where to begin changes from case to case.
STEP = 1 if "FFT_KILLS" in os.environ else 4


class Killed(BaseException):
    """What ends a process: nothing of it is done any more."""


@pytest.fixture(params=["store", "mounted"])
def out(request, store, tmp_path, monkeypatch):
    # Jobs that are killed here leave their threads behind, as killed processes do not.
    monkeypatch.setattr(owner, "RENEWED_EVERY", 3600.0)
    if request.param == "store":
        return f"s3://lake/{tmp_path.name}/out"
    refuse_like_a_mounted_store(monkeypatch)
    return str(tmp_path / "out")


def run(out, names, first, overwrite=True, meanwhile=lambda writers: None):
    with Output(out, names, [], overwrite, "parquet").claim({"job": "test"}) as writers:
        for writer in writers.values():
            write(writer, first)
        meanwhile(writers)


def content(place: str) -> int | None:
    try:
        table = Table.open(place)
    except UserError:
        return None
    ids = {i for group in range(len(table.row_groups)) for i in table.read(group).input_ids.tolist()}
    assert table.tokens == 12
    (first,) = ids
    return first


def contents(out, names):
    return {content(Storage.at(out).below(name).name) for name in names}


def check_tidy(out, names, first):
    """Nothing lies there but the tables of one job."""
    assert contents(out, names) == {first}
    assert {name for name, size in Storage.at(out).here().items() if size is None} <= {*names, QUARANTINE}
    for name in names:
        place = Storage.at(out).below(name)
        files = {one for one, size in place.here().items() if size is not None}
        parts = {one for one in files if NAMES.fullmatch(one)}
        assert files == parts | {MANIFEST_NAME, "_data.info"}
        assert {untried(one) for one in place.below(QUARANTINE).here()} == {untried(one) for one in parts}


def untried(name: str) -> str:
    """Part and job of a name."""
    return re.sub(r"-[0-9a-f]{8}-(.*)\..*", r"-\1", name)


@pytest.mark.parametrize("new", [SINGLE, SPLIT], ids=["single", "split"])
@pytest.mark.parametrize("old", [None, SINGLE], ids=["none", "single"])
def test_killed_anywhere_the_old_table_or_the_new_is_there(old, new, out, monkeypatch):
    step = STEP * (3 if out.startswith("s3://") else 1)
    alive, point, seen = False, (len(new) + 5 * bool(old)) % step, set()
    while not alive:
        place = f"{out}/{point}"
        if old:
            run(place, old, 1)
        with monkeypatch.context() as patch:
            left = kill_at(point, patch)
            with contextlib.suppress(Killed):
                run(place, new, 2)
            alive = left() >= 0
        found = contents(place, new)
        if old and found != {2}:
            assert contents(place, old) in ({1}, {2, 1}), point
        seen |= found
        if not alive:
            with monkeypatch.context() as patch:
                patch.setattr(store_owner, "lives_here", lambda facts: False)  # this process lives on
                if found == {2} or old:
                    with pytest.raises(UserError, match="exists: give"):
                        run(place, new, 3, overwrite=False)
                run(place, new, 3)
            check_tidy(place, new, 3)
        else:
            check_tidy(place, new, 2)
        point += step
    assert seen >= {2}
    assert point > 15


def kill_at(point, patch):
    """Have the ``point``-th change of a storage, and all that follow, end the job."""
    left = point

    def dying(own):
        def changed(*given):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return own(*given)

        return changed

    for name in ("write", "delete", "create", "delete_folder"):
        patch.setattr(Storage, name, dying(getattr(Storage, name)))
    return lambda: left


def test_a_second_job_is_refused_while_the_first_lives(out):
    with Output(out, SINGLE, [], True, "parquet").claim({}) as writers:
        for overwrite in (False, True):
            with pytest.raises(Occupied, match=rf"`output` {out} is being written by another job: process "):
                run(out, SINGLE, 9, overwrite)
        with pytest.raises(Occupied, match=r"which `output` .*train overlaps, is being written"):
            Output(f"{out}/train", SINGLE, [], True, "parquet").check()
        write(writers[""], 1)
    check_tidy(out, SINGLE, 1)
    with pytest.raises(UserError, match="exists: give `overwrite=True`"):
        run(out, SINGLE, 2, overwrite=False)


def test_a_job_that_was_taken_over_stops_and_leaves_the_others_table(out):
    def taken_over(_):
        place = Storage.at(out)
        place.delete([f"{OWNERS}/{name}" for name in place.below(OWNERS).here()])
        run(out, SINGLE, 2)

    with pytest.raises(UserError, match="was taken over by another job while this one stood still"):
        run(out, SINGLE, 1, False, taken_over)
    check_tidy(out, SINGLE, 2)


def test_while_a_table_is_replaced_readers_have_the_old_one(out):
    """Also when all new files are there; and what a task writes after its job is over is nothing."""
    run(out, SINGLE, 1)
    late = []

    def look(writers):
        assert content(out) == 1
        writers[""].publish()
        assert content(out) == 1
        late.append(PartFile(writers[""].target, 0))

    run(out, SINGLE, 2, meanwhile=look)
    late[0].write(rows(7))
    late[0].finish({})
    assert content(out) == 2
    run(out, SINGLE, 3)
    check_tidy(out, SINGLE, 3)


def test_a_job_that_fails_removes_its_own_files_alone(out):
    def fails(_):
        raise UserError("no room")

    for before in (None, 1):
        lying = Storage.at(out).here()
        with pytest.raises(UserError, match="no room"):
            run(out, SINGLE, 2, True, fails)
        assert Storage.at(out).here() == lying
        assert content(out) == before
        assert before or Storage.at(out).info().type == FileType.NotFound
        run(out, SINGLE, 1)


def test_what_no_store_gives_is_said_before_the_work(store, tmp_path):
    with pytest.raises(UserError, match=r"^`output` s3://none/at/all: there is no none: make it first"):
        run("s3://none/at/all", SINGLE, 1)
    run(f"s3://lake/{tmp_path.name}/in", SINGLE, 1)
    with pytest.raises(UserError, match="overlap: write to a folder beside it"):
        Output(f"s3a://lake/{tmp_path.name}", SINGLE, [f"s3://lake/{tmp_path.name}/in"], True, "parquet").check()
    Output(f"s3://lake/{tmp_path.name}/out", SINGLE, ["dbfs:/who/knows"], True, "parquet").check()
    with Storage.at(f"s3://lake/{tmp_path.name}/notes").create("mine.txt").stream as stream:
        stream.write(b"mine")
    with pytest.raises(UserError, match=r"notes/mine.txt, which is no part of a table: give another folder"):
        run(f"s3://lake/{tmp_path.name}/notes", SINGLE, 1)


def test_bytes_are_those_of_a_disk(out, tmp_path):
    run(str(tmp_path / "here"), SINGLE, 1)
    run(out, SINGLE, 1)
    here, there = Table.open(tmp_path / "here"), Table.open(out)
    assert here.fingerprint == there.fingerprint
    for one, other in zip(here.row_groups, there.row_groups, strict=True):
        with there.filesystem.open_input_file(other.path) as stream:
            assert stream.read() == (tmp_path / "here" / one.path).read_bytes()


def test_delta_tables_of_a_store_have_versions(store, tmp_path):
    url = f"s3://lake/{tmp_path.name}/delta"
    for version in (0, 1):
        with Output(url, SINGLE, [], True, "delta").claim({}) as writers:
            write(writers[""], version + 1)
            with pytest.raises(Occupied):
                Output(url, SINGLE, [], True, "delta").check()
        assert (content(url), Table.open(url).version) == (version + 1, version)
    assert content(f"{url}@v0") == 1
    with pytest.raises(UserError, match=r"exists: give `overwrite=True` to add a version"):
        Output(url, SINGLE, [], False, "delta").check()
    with pytest.raises(UserError, match=r'is a Delta table: give `format="delta"`, or another folder'):
        Output(url, SINGLE, [], True, "parquet").check()
    assert not {OWNERS, WRITING_NAME} & {*Storage.at(url).here()}


@pytest.mark.parametrize("after", [18, 30, 45])
def test_credentials_that_expire_in_the_middle(after, store_environment, store, tmp_path, monkeypatch):
    """The job ends with a sentence, as does what it could not remove; the old table stays, and the next job goes on."""
    out = f"s3://lake/{tmp_path.name}/out"
    run(out, SINGLE, 1)
    with expiring(store_environment["AWS_ENDPOINT_URL"], after) as (url, counts), monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=r"(written to|listed) .*(ExpiredToken|ACCESS_DENIED|expired|403)"):
            run(out, SINGLE, 2)
    assert counts["refused"]
    assert content(out) == 1
    monkeypatch.setattr(store_owner, "lives_here", lambda facts: False)  # this process lives on
    run(out, SINGLE, 3)
    check_tidy(out, SINGLE, 3)


def test_a_store_that_is_full(store_environment, store, tmp_path, monkeypatch):
    """The job ends with a sentence; the old table stays, and nothing of the new one."""
    out = f"s3://lake/{tmp_path.name}/out"
    run(out, SINGLE, 1)
    lying = Storage.at(out).here().keys()
    with full(store_environment["AWS_ENDPOINT_URL"], 6) as (url, counts), monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=r"out cannot be written to \(.*StorageFull.*\): make room there, or have"):
            run(out, SINGLE, 2)
    assert counts["refused"]
    assert content(out) == 1
    assert Storage.at(out).here().keys() - {OWNERS} == lying  # of an empty folder such a store makes a file
    assert not Storage.at(out).below(OWNERS).here()
    run(out, SINGLE, 3)
    check_tidy(out, SINGLE, 3)


def test_finished_parts_of_dear_work_wait_for_the_rest(out, monkeypatch):
    """Also those that a job had begun to publish when it was killed."""
    with pytest.raises(Interrupted):
        work_on(out, stop=2)
    there = Storage.at(out).here()
    files = {name for name in there if name.endswith(".parquet")}
    assert (waiting(out), len(files)) == ({"a": 2}, 2)
    assert {*there} - files == {FINISHED, QUARANTINE, WRITING_NAME}
    with pytest.raises(UserError, match="is unfinished"):
        Table.open(out)
    with monkeypatch.context() as patch:
        kill_at_commit(patch)
        with pytest.raises(Killed):
            work_on(out)
    monkeypatch.setattr(store_owner, "lives_here", lambda facts: False)  # this process lives on
    assert work_on(out) == []
    table = Table.open(out)
    ids = [table.read(group).input_ids.tolist() for group in range(3)]
    assert ids == [[0], [1, 1], [2, 2, 2]]
    assert len(Storage.at(out).below(QUARANTINE).here()) == 1
    assert FINISHED not in Storage.at(out).here()


def kill_at_commit(patch):
    def killed(*_):
        kill_at(0, patch)
        raise Killed

    patch.setattr("spark_jobs.token_table.output.commit_all", killed)
