"""Parts of ``train_on_cluster`` that need no cluster."""

import socket
from types import SimpleNamespace

import pytest

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.spark import checks, cluster, places
from fft.spark.channel import DriverLine, Listener
from fft.train_arguments import TrainArguments


def test_settings_of_a_file_and_of_keywords_travel_as_flags(tmp_path):
    """To nodes that have no such file."""
    config = tmp_path / "run.yaml"
    config.write_text("lora_dim: 4\nlearning_rate: 2.0e-4\npartition_method: 2,-1\nragged: true\n")
    flags = {"model": tmp_path, "train_data": "a b:0.5", "output_dir": "out", "encoder_pipe_parallel_size": -1}
    args = cluster._parse({**flags, "config": config, "overwrite": True, "init": False, "eval_data": None})
    assert (args.lora_dim, args.overwrite, args.init) == (4, True, False)
    assert parse_arguments(cluster._as_flags(args)) == args


def test_a_driver_hears_those_who_know_its_secret():
    listener = Listener("127.0.0.1", "127.0.0.1")
    address, port, _ = listener.reached_at
    with socket.create_connection((address, port)) as stranger:
        stranger.sendall("für 0\n".encode() + b'{"line": "heard"}\n')
        assert stranger.recv(1) == b""  # hung up on
    line = DriverLine(listener.reached_at, 3)
    line.tell({"line": "heard"})
    assert listener.told.get(timeout=300) == (3, {"line": "heard"})
    line.watch(600)
    listener.stop(7)
    while line.stop_within is None:
        pass
    assert line.stop_within == 7
    line.close()
    assert listener.told.get(timeout=300) == (3, None)
    listener.close()


def test_a_driver_that_cannot_be_reached_changes_nothing():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    line = DriverLine(("127.0.0.1", port, "secret"), 0)
    line.tell({"line": "lost"})
    line.close()
    assert not line.is_open


def test_folders_that_are_others_on_another_machine_are_found_out(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path / "a" / "b"), checkpoint=str(tmp_path))
    with places.tokens_beside(args, "_fft_seen_1") as beside:
        assert beside == {"output_dir": str(tmp_path), "checkpoint": str(tmp_path)}
        places.check_tokens(beside, "_fft_seen_1", "on host x")
        with pytest.raises(UserError, match=f"--output_dir: {tmp_path} is another folder on host x than on the driver"):
            places.check_tokens(beside, "_fft_seen_2", "on host x")
    assert not list(tmp_path.iterdir())


def test_tables_of_a_blend_are_looked_for_without_weights_and_versions(tmp_path):
    read = places.places_read(TrainArguments(model=str(tmp_path), train_data=f"{tmp_path}@v3:0.5 {tmp_path}/none:2"))
    assert read == [("model", str(tmp_path)), ("train_data", str(tmp_path)), ("train_data", f"{tmp_path}/none")]
    with pytest.raises(UserError, match=r"--train_data .*/none is not there on host x: name a folder that the driver"):
        places.check_read(read, "on host x")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "the engine of this session runs no tasks side by side"),
        (
            {"spark.master": "yarn", "spark.dynamicAllocation.enabled": "true"},
            "spark.dynamicAllocation.enabled is true",
        ),
        ({"spark.master": "yarn"}, r"`processes`=8 on each node, and executors have no GPUs that Spark knows of"),
        (
            {"spark.master": "yarn", "spark.executor.resource.gpu.amount": "4"},
            r"`processes`=8 on each node, and executors have 4 GPUs each",
        ),
    ],
)
def test_sessions_that_cannot_run_it_are_refused(settings, sentence):
    session = SimpleNamespace(conf=SimpleNamespace(get=lambda name, default: settings.get(name, default)))
    with pytest.raises(UserError, match=sentence):
        checks.check_session(session, 2, 8, use_gpu=True)


def test_credentials_are_what_is_handed_on(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    monkeypatch.setenv("HOME_OF_NOBODY", "b")
    assert {"AWS_SECRET_ACCESS_KEY": "a"}.items() <= checks.credentials().items()
    assert "HOME_OF_NOBODY" not in checks.credentials()
