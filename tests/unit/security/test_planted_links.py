"""Links, pipes and marks that others leave in a shared folder: nothing is written, emptied or removed through them."""

import os

import pytest
from unit.checkpoint.test_folder import make
from unit.spark_jobs.test_output import write

from fft.checkpoint import folder
from fft.checkpoint.run import LocalRun
from fft.data.manifest import WRITING_NAME
from fft.data.owner import OWNER_NAME, owned
from fft.errors import UserError
from fft.files import alone, atomic_file, copy_file, own_folder, remove_path, start_folder, write_atomically, write_file
from fft.serve.outputs import Partial
from fft.training.metric_sinks import JsonLines
from spark_jobs.token_table.output import Output
from spark_jobs.token_table.remains import holds_table

TEXT = "what a victim wrote\n"


@pytest.fixture
def victim(tmp_path):
    """A folder of somebody, with a file and a folder in it; it has to be as it was when a test ends."""
    there = tmp_path / "victim"
    (there / "below").mkdir(parents=True)
    for name in ("diary", "below/letter", "config.json"):
        (there / name).write_text(TEXT)
    before = sorted(there.rglob("*"))
    yield there
    assert sorted(there.rglob("*")) == before
    assert [path.read_text() for path in before if path.is_file()] == [TEXT] * 3


@pytest.fixture
def run(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")  # the folder that the user names may be a link
    return tmp_path / "run"


def test_a_link_in_the_place_of_a_checkpoint(run, victim):
    (run / "step-1").symlink_to(victim)
    make(run, 1)
    assert not (run / "step-1").is_symlink()
    assert folder.fault(run / "step-1") is None
    assert sorted(path.name for path in run.iterdir()) == [folder.LATEST, "step-1"]


@pytest.mark.parametrize("mark", ["writing", "old", "removed", "bad"])
def test_links_under_hidden_names_block_nothing(run, victim, mark):
    make(run, 1)
    make(run, 2)
    for step in (1, 2, 3):
        (run / f".step-{step}.{mark}").symlink_to(victim)
    checkpoints = LocalRun(run)
    checkpoints.tidy()
    make(run, 3)
    checkpoints.remove("step-1")
    checkpoints.set_aside("step-2")
    checkpoints.tidy()
    left = {path.name for path in run.iterdir()} - {".step-1.bad", ".step-3.bad"}
    assert left == {".step-2.bad", folder.LATEST, "step-3"}
    assert not (run / ".step-2.bad").is_symlink()


def test_a_checkpoint_that_is_a_link_is_removed_and_not_what_it_leads_to(run, victim):
    (run / "step-7").symlink_to(victim)
    LocalRun(run).remove("step-7")
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "dead link"])
def test_a_lock_is_a_file(run, victim, kind):
    plant(run / folder.LOCK, victim, kind)
    with pytest.raises(UserError, match=r"\.lock: it is a link, or no file: remove it"), folder.locked(run):
        pass
    with pytest.raises(OSError, match="it is a link, or no file"), alone(run / folder.LOCK):
        pass


def plant(path, victim, kind):
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim / ("diary" if kind == "link" else "new"))


@pytest.mark.parametrize("kind", ["link", "pipe", "dead link"])
def test_lines_are_added_to_a_file(run, victim, tmp_path, kind):
    plant(run / folder.METRICS, victim, kind)
    with pytest.raises(UserError, match="it is a link, or no file"):
        JsonLines(run / folder.METRICS).write(1, {"loss": 1.0})
    plant(run / ".answers.jsonl.partial", victim, kind)
    if kind != "dead link":
        write_atomically(run / ".answers.jsonl.partial.json", "{}")
        with pytest.raises(OSError, match="it is a link, or no file"):
            Partial(run / "answers.jsonl", {}, resume=True)
    Partial(run / "answers.jsonl", {}, resume=False).close()
    assert not (run / ".answers.jsonl.partial").is_symlink()


def test_numbers_of_an_older_run_go_and_not_what_a_link_leads_to(run, victim):
    (run / folder.TENSORBOARD).symlink_to(victim)
    with pytest.raises(OSError, match="it is a link, or no folder"):
        own_folder(run / folder.TENSORBOARD)
    LocalRun(run).forget()
    assert list(run.iterdir()) == []


def test_names_of_unfinished_files_cannot_be_known(run, victim):
    seen = set()
    for _ in range(3):
        with atomic_file(run / "arguments.yaml") as aside:
            seen.add(aside.name)
            aside.write_text("x")
    assert len(seen) == 3
    (run / "arguments.yaml").unlink()
    (run / "arguments.yaml").symlink_to(victim / "diary")
    write_atomically(run / "arguments.yaml", "new")
    assert (run / "arguments.yaml").read_text() == "new"


def test_files_take_the_place_of_links(run, victim):
    staging = start_folder(run / "step-1")
    (staging / "a").symlink_to(victim / "diary")
    (staging / "b").symlink_to(victim / "below")
    write_file(staging / "a", "mine")
    copy_file(staging / "a", staging / "b")
    assert [(staging / name).read_text() for name in "ab"] == ["mine", "mine"]


def test_the_mark_of_a_job_is_no_link(run, victim):
    (run / OWNER_NAME).symlink_to(victim / "diary")
    with pytest.raises(UserError, match="cannot be read"), owned(run / OWNER_NAME, "`output`"):
        pass


def test_what_takes_the_place_of_a_folder_while_it_is_removed_is_not_followed(run, victim, monkeypatch):
    """Between the look at what it is and its removal."""
    (run / "step-1").mkdir()
    lstat, swapped = os.lstat, []

    def swap(name, **where):
        found = lstat(name, **where)
        if name == "step-1" and not swapped:
            swapped.append(name)
            (run / "step-1").rmdir()
            (run / "step-1").symlink_to(victim)
        return found

    monkeypatch.setattr(os, "lstat", swap)
    with pytest.raises(OSError, match=r"(?i)symbolic link|directory"):
        remove_path(run / "step-1")
    assert swapped


@pytest.fixture
def table(tmp_path):
    """A table of somebody, which another has marked as unfinished."""
    place = tmp_path / "table"
    with Output(place, [""], [], False, "parquet").claim({}) as writers:
        write(writers[""], 1)
    (place / "_fft_manifest.json").unlink()
    before = contents(place)
    (place / WRITING_NAME).write_text("{}")
    yield place
    assert {n: b for n, b in contents(place).items() if n != WRITING_NAME} == before


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["train", "validation", "_finished", "_quarantine", "train/_finished"])
def test_tables_behind_links_in_an_output_stay(tmp_path, table, name, overwrite):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(table)
    with (
        pytest.raises(UserError, match=rf"`output` .*out has a link {name}, and what links lead to is neither"),
        Output(out, ["train", "validation"], [], overwrite, "parquet").claim({}),
    ):
        pass


def test_an_output_may_be_a_link_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for first in (1, 2):
        with Output(tmp_path / "out", ["train"], [], True, "parquet").claim({}) as writers:
            write(writers["train"], first)
    assert (tmp_path / "out").is_symlink()
    assert set(contents(tmp_path / "disk" / "train")) >= {"_fft_manifest.json"}


def test_links_that_appear_while_a_job_runs_are_not_followed(tmp_path, victim):
    out = tmp_path / "out"
    place = Output(out, ["train"], [], True, "parquet").places["train"]
    out.mkdir()
    (out / "train").symlink_to(victim)
    for touch in (
        place.make,
        lambda: place.delete_folder("below"),
        lambda: place.delete(["diary"]),
        lambda: place.write("new", ""),
        lambda: place.move("diary", "letter"),
        lambda: place.create("new"),
        lambda: place.below("below").delete(["letter"]),
    ):
        with pytest.raises(OSError, match="it is a link, or no folder"):
            touch()


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made by root")
def test_a_mark_is_believed_of_who_wrote_the_files(table):
    """Who may write to a shared folder may mark a table there as unfinished, which jobs then clear away."""
    place = Output(table, [""], [], False, "parquet").place
    os.chown(table / WRITING_NAME, 65534, 65534)
    assert holds_table(place)
    with pytest.raises(UserError, match="exists: give"):
        Output(table, [""], [], False, "parquet").check()
    os.chown(table / WRITING_NAME, os.geteuid(), -1)
    assert not holds_table(place)
