"""Saves behind the training: of the moment they were asked for, and on the disk before they have their name."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaConfig

from fft import files
from fft.checkpoint import folder, saver
from fft.checkpoint.run import LocalRun
from fft.checkpoint.saver import Contents, RankShare, Saver
from fft.files import replace_folder, start_folder
from fft.weights import hf


@pytest.fixture
def alone():
    """A world of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def save(run: Path, kind: str, control, change) -> None:
    """Two saves; ``change`` is called with the live tensors right after each."""
    contents = Contents(LocalRun(run), LlamaConfig(), None, None, 1, newest=0, best=0)
    weight, moment = torch.ones(1000), torch.ones(1000)
    made = Saver(contents, kind, control)
    for step in (1, 2):
        weight.fill_(step)
        moment.fill_(-step)
        share = RankShare(({"w": weight}, 0), ({"exp_avg/w": moment}, {"fragments": "{}"}))
        made.save(folder.checkpoint_tag(step), share, {"step": step, "eval_loss": None})
        change(weight, moment)
        made.finish()
    made.close()


@pytest.mark.parametrize("kind", ["none", "thread", "process"])
def test_what_is_saved_is_of_its_moment(kind, alone, tmp_path, monkeypatch):
    """Training goes on while it is written: later weights under valid checksums would be the worst of all faults."""
    changed, write = threading.Event(), saver._write_share

    def late(*given):
        assert kind != "thread" or changed.wait(300)
        changed.clear()
        write(*given)

    if kind != "process":  # which takes seconds to begin
        monkeypatch.setattr(saver, "_write_share", late)

    def train_on(*tensors):
        for tensor in tensors:
            tensor.fill_(99)
        changed.set()

    save(tmp_path, kind, alone, train_on)
    for step in (1, 2):
        checkpoint = tmp_path / folder.checkpoint_tag(step)
        assert folder.fault(checkpoint) is None
        assert load_file(checkpoint / "model.safetensors")["w"].unique().tolist() == [step]
        assert load_file(checkpoint / "training" / "rank-00000.safetensors")["exp_avg/w"].unique().tolist() == [-step]


def test_all_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append(f"named {Path(b).name}"), replace(a, b)))
    staging = start_folder(tmp_path / "step-1")
    (staging / folder.TRAINING).mkdir()
    for name in ("a.safetensors", f"{folder.TRAINING}/b.safetensors"):
        done.clear()
        hf.write_tensors(staging / name, {"w": torch.ones(4)}, {"format": "pt"})
        assert Path(name).name in done  # by who wrote it, while others still write
    (staging / "config.json").write_text("{}")
    done.clear()
    replace_folder(tmp_path / "step-1")
    named = done.index("named step-1")
    assert set(done[:named]) == {"a.safetensors", "b.safetensors", "training", "config.json", ".step-1.writing"}
    assert done[named + 1] == tmp_path.name
