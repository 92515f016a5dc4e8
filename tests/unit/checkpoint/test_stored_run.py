"""A run's folder in a store: a checkpoint is one by its checksums alone, and all else is as on a disk."""

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file
from transformers import LlamaConfig

from fft.checkpoint import folder
from fft.checkpoint.model_folder import copy_model
from fft.checkpoint.run import LocalRun
from fft.checkpoint.saver import Contents, RankShare, _publish, _write_share
from fft.checkpoint.stored_run import run_at
from fft.data.views import files_below, origin
from fft.errors import UserError


@pytest.fixture
def run(store, tmp_path):
    return run_at(f"s3://lake/{tmp_path.name}/")


def write(run, step, loss=None, ranks=2, publish=True):
    """What the ranks of a run write of a checkpoint, and then the first of them."""
    contents, tag = Contents(run, LlamaConfig(), None, None, ranks, newest=0, best=0), folder.checkpoint_tag(step)
    run.start(tag)
    for rank in range(ranks):
        weights = {f"w{rank}": torch.full((1000,), float(step))}, rank
        training = {"exp_avg/w": torch.full((1000,), -float(step))}, {"fragments": "{}"}
        _write_share(tag, RankShare(weights, training), contents, rank)
    if publish:
        _publish(contents, tag, {"step": step, "eval_loss": loss})
    return tag


def files(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_same_files_as_on_a_disk(run, store, tmp_path):
    tags = [write(one, 3, loss=0.5) for one in (run, LocalRun(tmp_path / "local"))]
    fs.copy_files(f"{run.storage.root}/{tags[0]}", str(tmp_path / "fetched"), store, fs.LocalFileSystem())
    assert files(tmp_path / "fetched") == files(tmp_path / "local" / tags[1])
    assert folder.fault(run.view(tags[0])) is None
    assert folder.read_state(run.view(tags[0])) == {"step": 3, "eval_loss": 0.5}
    assert origin(run.view(tags[0])) == f"{run.name}/step-3"
    copy_model(run.view(tags[0]), str(tmp_path / "model"))
    assert load_file(tmp_path / "model" / "model-00002-of-00002.safetensors")["w1"].unique().tolist() == [3]
    assert not (tmp_path / "model" / "training").exists()


def test_what_is_not_whole_is_none_and_is_told(run):
    write(run, 1)
    write(run, 2, publish=False)
    assert run.steps() == [1]
    assert run.tidy() == [f"{run.name}/step-2 has no SHA256SUMS, it was left half done: removed"]
    assert run.tidy() == []
    assert not [name for name in files_below(run.storage) if name.startswith("step-2/")]


def test_the_newest_and_the_best_are_kept(run):
    for step, loss in ((1, 5.0), (2, 1.0), (3, None), (4, 2.0)):
        write(run, step, loss)
    run.prune(newest=1, best=1)
    assert run.steps() == [2, 4]
    assert [run.tag_of(name) for name in ("latest", "best", "step-9")] == ["step-4", "step-2", "step-9"]
    run.remove("step-2")
    run.point_again()
    assert run.tag_of("best") == "step-4"
    run.remove("step-4")
    run.point_again()
    with pytest.raises(UserError, match="has no 'latest' checkpoint: name one by its step"):
        run.tag_of("latest")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "training/state.json"])
def test_a_damaged_one_is_named_and_set_aside(run, name):
    tag = write(run, 1)
    whole = run.storage.read(f"{tag}/{name}")
    run.storage.write(f"{tag}/{name}", bytes(reversed(whole)))
    assert folder.fault(run.view(tag)).startswith(f"{run.name}/step-1/{name} is not what was written")
    assert run.set_aside(tag) == f"{run.name}/step-1/SHA256SUMS.bad"
    assert (run.steps(), run.tidy()) == ([], [])
    assert run.storage.exists(f"{tag}/config.json")
    write(run, 1)
    assert folder.fault(run.view(tag)) is None


def test_numbers_grow_here_and_are_put_whole(run):
    run.put("metrics.jsonl", "1\n")
    with open(run.notes / "metrics.jsonl", "a") as stream:
        stream.write("2\n")
    (run.notes / "tensorboard").mkdir()
    (run.notes / "tensorboard" / "events").write_text("x")
    assert run.text("metrics.jsonl") == "1\n"
    write(run, 1)
    assert (run.text("metrics.jsonl"), run.text("tensorboard/events")) == ("1\n2\n", "x")
    run.forget()
    assert (run.text("metrics.jsonl"), run.text("tensorboard/events")) == (None, None)


def test_one_run_at_a_time(run):
    occupied = pytest.raises(UserError, match=f"{run.name} is being written by another job")
    with run.hold(), occupied, run_at(run.name).hold():
        pass
    with run.hold():
        assert run.steps() == []
