"""A rank's device and its process group, with an accelerator and a DeepSpeed that only note what they are asked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler

from fft.models.experts import LoadBalance, Routing
from fft.ops.documents import UnderWay
from fft.training import engine
from fft.training.inputs import Sender


def test_a_rank_takes_its_device_before_it_communicates(monkeypatch):
    done = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", set_device=lambda index: done.append(f"device {index}"))
    monkeypatch.setattr(engine.deepspeed, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda verbose: done.append("joined"))
    monkeypatch.setattr(engine.dist, "barrier", lambda device_ids: done.append(f"barrier {device_ids}"))
    launched = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    engine.init_distributed()
    assert done == ["device 3", "joined", "barrier [3]"]


@pytest.mark.parametrize(("fp16", "scale"), [(True, 1024.0), (False, 1.0)])
def test_the_experts_balance_loss_is_scaled_as_the_loss_is(fp16, scale):
    """By fp16's loss scale as it stands before the step: its gradients are divided by it with all others."""
    balance, weights = LoadBalance(Routing(torch.nn.Linear, 0, 4, 2, coefficient=0.5, layers=3)), []
    deepspeed = SimpleNamespace(
        micro_batches=8,
        optimizer=SimpleNamespace(loss_scale=1024),
        fp16_enabled=lambda: fp16,
        train_batch=lambda batches: weights.append(balance.weight) or 0.0,
        timers=lambda name: SimpleNamespace(reset=lambda: None),
    )
    stage = engine.StageEngine.__new__(engine.StageEngine)
    stage.deepspeed, stage._balance, stage.role = deepspeed, balance, SimpleNamespace(last=False)
    stage._sender = Sender(UnderWay(), torch.device("cpu"), None)
    stage.step([])
    assert weights == [0.5 * scale / (8 * 3)]


def half_engine() -> engine.StageEngine:
    """An engine in fp16 of which there is nothing but the loss scale."""
    scaler = loss_scaler.DynamicLossScaler(2.0**16, 4, 1.0, 2, False)
    optimizer = SimpleNamespace(loss_scaler=scaler)
    made = object.__new__(engine.StageEngine)
    made.deepspeed = SimpleNamespace(fp16_enabled=lambda: True, optimizer=optimizer, skipped_steps=0, global_steps=0)
    made.optimizer, made.parameters = None, {}
    return made


def test_the_whole_loss_scale_is_saved(monkeypatch):
    """Whatever of it changes in a run; the next one then scales as this one would have."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(engine.optimizer_state, "restore", lambda *_: None)
    before, after = half_engine(), half_engine()
    scaler = before.deepspeed.optimizer.loss_scaler
    for overflow in (True, True, True, *[False] * 6, True, False):
        scaler.update_scale(overflow)
    before.deepspeed.skipped_steps = 4
    fresh = vars(half_engine().deepspeed.optimizer.loss_scaler)
    assert {name for name, value in vars(scaler).items() if value != fresh[name]} <= before.scaler_state().keys()
    after.restore(Path("training"), {}, 11, before.scaler_state())
    assert after.skipped == 4
    for overflow in (False, False, False, False, True, *[False] * 9):
        for made in (before, after):
            made.deepspeed.optimizer.loss_scaler.update_scale(overflow)
        assert vars(after.deepspeed.optimizer.loss_scaler) == vars(scaler)
