"""A rank's device and its process group, with an accelerator and a DeepSpeed that only note what they are asked."""

from types import SimpleNamespace

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
