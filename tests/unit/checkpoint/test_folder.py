"""Run folders: what is whole, what is kept, who may write."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from fft.checkpoint import folder
from fft.checkpoint.model_folder import copy_model
from fft.checkpoint.run import LocalRun
from fft.errors import UserError
from fft.files import start_folder
from fft.weights import hf


def make(run, step, **state):
    """A checkpoint of two shards as the trainer leaves it."""
    tag = folder.checkpoint_tag(step)
    staging = start_folder(run / tag)
    (staging / folder.TRAINING).mkdir()
    for shard in range(2):
        hf.write_shard(staging, {f"{shard}.weight": torch.full((4,), float(step))}, shard, 2)
        rank_file = f"{folder.TRAINING}/rank-0000{shard}.safetensors"
        hf.write_tensors(staging / rank_file, {"exp_avg/x": torch.ones(4)}, {"fragments": "{}"})
        folder.note_sums(staging, [hf.shard_name(shard, 2), rank_file], shard)
    names = hf.write_metadata(staging, LlamaConfig(), None, 2)
    (staging / folder.STATE).write_text(folder.to_json({"step": step, **state}))
    folder.note_sums(staging, [*names, folder.STATE], "rest")
    folder.publish_checkpoint(run, tag)
    return run / tag


def test_a_checkpoint_is_whole_for_us_and_for_sha256sum(tmp_path):
    checkpoint = make(tmp_path, 3)
    assert folder.fault(checkpoint) is None
    subprocess.run(["sha256sum", "--check", "--quiet", folder.SUMS], cwd=checkpoint, check=True)
    assert (tmp_path / folder.LATEST).read_text() == "step-3\n"
    assert hf.WeightReader(checkpoint).read("1.weight", torch.Size([4])).tolist() == [3.0] * 4


FILES = [
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "training/rank-00001.safetensors",
    "training/state.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("parts", [1, 3])
def test_harm_is_found_and_named(tmp_path, name, harm, parts):
    checkpoint = make(tmp_path, 3)
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    file.unlink()
    if harm != "remove":
        file.write_bytes(content[:-1] if harm == "truncate" else content)
    found = [folder.fault(checkpoint, part, parts) for part in range(parts)]
    assert [fault for fault in found if fault is not None and str(file) in fault], found


@pytest.mark.parametrize("text", ["", "half a li", f"{'0' * 64}  config.json"])
def test_sums_that_are_none_are_named(tmp_path, text):
    checkpoint = make(tmp_path, 3)
    (checkpoint / folder.SUMS).write_text(text)
    assert str(checkpoint) in folder.fault(checkpoint)
    (checkpoint / folder.SUMS).unlink()
    assert "SHA256SUMS cannot be read" in folder.fault(checkpoint)


@pytest.mark.parametrize("name", [*FILES, "model-00002-of-00002.safetensors"])
def test_files_that_are_missing_from_the_sums_are_named(tmp_path, name):
    """Whoever changed a file and took it off the list would have it accepted."""
    checkpoint = make(tmp_path, 3)
    lines = (checkpoint / folder.SUMS).read_text().splitlines(keepends=True)
    (checkpoint / folder.SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    (checkpoint / "notes.txt").write_text("somebody's own")  # is no fault
    assert folder.fault(checkpoint) == f"{checkpoint / name} is missing from SHA256SUMS"


losses = st.one_of(st.none(), st.floats(0, 10), st.just(float("nan")))


@given(st.dictionaries(st.integers(1, 99), losses, min_size=1), st.integers(0, 5), st.integers(0, 5))
def test_what_is_kept(losses, newest, best):
    kept = folder.kept(losses, newest, best)
    assert max(losses) in kept  # whatever else: the run can go on
    recent = set(sorted(losses)[-newest:]) if newest else set(losses)
    assert recent <= kept <= set(losses)
    evaluated = {step: loss for step, loss in losses.items() if loss is not None and loss == loss}
    assert len(kept) <= len(recent) + best
    if best and evaluated:
        assert any(losses[step] == min(evaluated.values()) for step in kept)


def test_the_best_has_a_name(tmp_path):
    """Of those that are kept; it goes when none was evaluated."""
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None)):
        make(tmp_path, step, eval_loss=loss)
    LocalRun(tmp_path).prune(newest=2, best=1)
    assert (tmp_path / "best").read_text() == "step-2\n"
    assert LocalRun(tmp_path).tag_of("best") == "step-2"
    assert LocalRun(tmp_path).tag_of("latest") == "step-4"
    assert LocalRun(tmp_path).tag_of("step-9") == "step-9"
    LocalRun(tmp_path).prune(newest=1, best=0)
    assert folder.checkpoint_steps(tmp_path) == [4]
    with pytest.raises(UserError, match="has no 'best' checkpoint"):
        LocalRun(tmp_path).tag_of("best")


def test_the_names_are_of_what_is_there_after_a_run_went_back(tmp_path):
    """As `--resume best --overwrite` does: the newer checkpoints go."""
    for step, loss in ((1, 2.0), (2, 1.0), (3, 0.5)):
        make(tmp_path, step, eval_loss=loss)
    assert LocalRun(tmp_path).tag_of("latest") == "step-3"
    folder.remove(tmp_path / "step-3")
    LocalRun(tmp_path).point_again()
    assert [LocalRun(tmp_path).tag_of(name) for name in ("latest", "best")] == ["step-2", "step-2"]
    for step in (1, 2):
        folder.remove(tmp_path / f"step-{step}")
    LocalRun(tmp_path).point_again()
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_checkpoint(tmp_path):
    """Without what a run goes on from."""
    checkpoint, output = make(tmp_path / "run", 3), tmp_path / "model"
    (checkpoint / "templates" / folder.TRAINING).mkdir(parents=True)
    (checkpoint / "templates" / folder.TRAINING / "a.jinja").touch()
    copy_model(checkpoint, str(output))
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    shards = {hf.shard_name(shard, 2) for shard in range(2)}
    assert found == {"config.json", "model.safetensors.index.json", "templates/training/a.jinja", *shards}


def test_pruning_leaves_other_folders_alone(tmp_path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        make(tmp_path, step, eval_loss=loss)
    (tmp_path / "step-0").mkdir()
    (tmp_path / "step-0" / "config.json").write_text("{}")
    LocalRun(tmp_path).prune(newest=1, best=1)
    assert folder.checkpoint_steps(tmp_path) == [0, 2, 4]
    assert not list(tmp_path.glob(".step-*"))


def test_one_run_at_a_time(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from fft.checkpoint.folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"in use by another run \(process {other.pid} on "),
            folder.locked(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
    with folder.locked(tmp_path):  # a lock goes with its holder, also when that was killed
        pass


def test_what_was_left_half_done_is_cleared(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 3).rename(tmp_path / ".step-3.old")  # killed between the two renames of a replacement
    for left in (".step-5.writing", ".step-1.removed"):
        (tmp_path / left / folder.TRAINING).mkdir(parents=True)
    folder.tidy(tmp_path)
    assert folder.checkpoint_steps(tmp_path) == [2, 3]
    assert not list(tmp_path.glob(".step-*"))


def test_files_that_a_run_was_killed_within_are_cleared(tmp_path):
    """Its own alone: somebody may be writing another one there."""
    program = (
        "import os, sys; from fft.files import atomic_file\n"
        "with atomic_file(__import__('pathlib').Path(sys.argv[1])) as aside: os.kill(os.getpid(), 9)"
    )
    for name in (folder.LATEST, folder.METRICS, "arguments.yaml", "report.html"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.glob(".*.writing"))) == 4
    (tmp_path / f".{folder.BEST}.{'0' * 16}.writing").mkdir()
    folder.tidy(tmp_path)
    assert sorted(path.name.split(".")[1] for path in tmp_path.iterdir()) == [folder.BEST, "report"]


def test_a_state_that_cannot_be_read_is_named(tmp_path):
    checkpoint = make(tmp_path, 2)
    assert folder.read_state(checkpoint) == {"step": 2}
    for text in ("{", json.dumps(3)):
        (checkpoint / folder.STATE).write_text(text)
        with pytest.raises(UserError, match=r"training/state\.json cannot be read"):
            folder.read_state(checkpoint)
