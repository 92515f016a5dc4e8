"""A rank's device and its process group, with an accelerator and a DeepSpeed that only note what they are asked."""

from types import SimpleNamespace

import pytest

from fft.models.experts import LoadBalance
from fft.training import engine


def test_a_rank_takes_its_device_before_it_communicates(monkeypatch):
    done = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", set_device=lambda index: done.append(f"device {index}"))
    monkeypatch.setattr(engine.deepspeed, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda verbose: done.append("joined"))
    monkeypatch.setattr(engine.dist, "barrier", lambda: done.append("barrier"))
    launched = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    engine.init_distributed()
    assert done == ["device 3", "joined", "barrier"]


@pytest.mark.parametrize(("fp16", "scale"), [(True, 1024.0), (False, 1.0)])
def test_the_experts_balance_loss_is_scaled_as_the_loss_is(fp16, scale):
    """By fp16's loss scale as it stands before the step: its gradients are divided by it with all others."""
    experts = SimpleNamespace(num_experts=4, router_aux_loss_coef=0.5)
    balance, weights = LoadBalance(experts, layers=3), []
    deepspeed = SimpleNamespace(
        micro_batches=8,
        optimizer=SimpleNamespace(loss_scale=1024),
        fp16_enabled=lambda: fp16,
        train_batch=lambda batches: weights.append(balance.weight) or 0.0,
    )
    stage = engine.StageEngine.__new__(engine.StageEngine)
    stage.deepspeed, stage._balance, stage.role = deepspeed, balance, SimpleNamespace(last=False)
    stage.step([])
    assert weights == [0.5 * scale / (8 * 3)]
