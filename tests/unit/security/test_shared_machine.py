"""Other accounts of a machine: those who connect where we listen, and who have made what we are about to use."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from fft.errors import UserError
from fft.files import private_folder
from fft.models.compiled import compiled
from fft.spark.channel import DriverLine, Listener
from fft.training import meeting
from fft.training.meeting import Peer
from fft.training.mlflow_sink import RunFacts
from fft.training.wandb_sink import WeightsAndBiases


def strangers_of(address, count=8):
    """Connections that say nothing, and those that never end what they say."""
    found = [socket.create_connection(address) for _ in range(count)]
    for number, one in enumerate(found):
        one.sendall(b"x" * (number % 2))
    return found


def test_a_rank_is_met_whoever_else_has_connected(monkeypatch):
    """One that is answered after each of them had its time would be said to be out of reach."""
    monkeypatch.setattr(meeting, "_CALL", 20)
    peers, links = [Peer(0, "here", "127.0.0.1"), Peer(1, "there", "127.0.0.2")], {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        strangers = strangers_of(address)
        with meeting._answering(listener, "token", peers, 0, links):
            begun = time.monotonic()
            met = meeting._call(Peer(0, "here", *address), 1, "token")
            assert time.monotonic() - begun < 20  # the first of those that are silent is still waited for
        assert list(links) == [1]
        for one in (met, links[1], *strangers):
            one.close()


def test_a_line_has_its_time_however_slowly_it_comes(monkeypatch):
    monkeypatch.setattr(meeting, "_CALL", 0.5)
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def drip():
        while not over.wait(0.2):
            theirs.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        with pytest.raises(OSError, match="timed out"):
            meeting._line(ours)
    finally:
        over.set()
        dripping.join()
        ours.close(), theirs.close()


@pytest.mark.parametrize("said", [b"", b"x" * 5000, b"wrong 0\n{}\n", b"\xff\xfe 0\n", b"wrong " + b"9" * 150 + b"\n"])
def test_a_driver_hears_no_stranger_and_hears_its_nodes_beside_them(said):
    listener = Listener("127.0.0.1", "127.0.0.1")
    stranger = socket.create_connection(listener.reached_at[:2])
    stranger.sendall(said)
    line = DriverLine(listener.reached_at, 0)
    line.tell({"line": "ours"})
    assert listener.told.get(timeout=30) == (0, {"line": "ours"})
    line.close()
    assert listener.told.get(timeout=30) == (0, None)
    assert listener.told.empty()
    stranger.close()
    listener.close()


def test_what_is_compiled_lies_in_no_folder_of_others(monkeypatch, tmp_path):
    """torch's own name is called after the user, and code that lies there is run: who makes it first is obeyed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    own = tmp_path / f"fft-compiled-{os.getuid()}"
    planted = tmp_path / "planted"
    planted.mkdir()
    for plant in (lambda: own.mkdir(mode=0o777), lambda: own.symlink_to(planted), lambda: own.write_text("")):
        plant()
        if own.is_dir() and not own.is_symlink():
            own.chmod(0o777)
        with pytest.raises(UserError, match=r"--compile: .*belongs to somebody else, or is open to others"):
            compiled(len, "aot_eager")
        own.rmdir() if own.is_dir() and not own.is_symlink() else own.unlink()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    compiled(len, "aot_eager")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert private_folder("fft-compiled") == own
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compiled(len, None) is len


def test_what_another_has_made_for_us_is_not_used(monkeypatch, tmp_path):
    other = os.getuid() + 1
    (tmp_path / f"fft-compiled-{other}").mkdir(mode=0o700)  # which is ours
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        private_folder("fft-compiled")


def test_weights_and_biases_writes_through_no_planted_link(monkeypatch, tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.mkdir()
    (run / "wandb").symlink_to(victim)

    class Planted:
        Settings = type("Settings", (), {"__init__": lambda self, **_: None})

        @staticmethod
        def init(**given):
            Path(given["dir"], "wandb", "debug.log").write_text("written")
            raise ValueError("it has been begun")

    monkeypatch.setitem(sys.modules, "wandb", Planted)
    with pytest.raises(OSError, match="it is a link, or no folder"):
        WeightsAndBiases(RunFacts(), run, print)
    assert not list(victim.iterdir())
