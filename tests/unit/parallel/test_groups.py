"""What a world of one listens at, and how values travel between ranks."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from listening import LOOPBACK, listens_at

from fft.parallel.groups import tell_all, told_by_first, trade

ALONE = """
import torch
from fft.training.engine import host_group, init_distributed
init_distributed()
total = torch.ones(2)
torch.distributed.all_reduce(total, group=host_group())
print(total.tolist(), torch.distributed.get_world_size(), flush=True)
input()
"""


def test_a_world_of_one_is_not_to_be_found():
    """Neither a store, which would be open to all networks, nor sockets of gloo at a machine's address."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "GLOO_SOCKET_IFNAME")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ALONE], env=environment, start_new_session=True, **pipes) as process:
        try:
            lines = iter(process.stdout.readline, "")  # DeepSpeed says something of its own
            assert "[1.0, 1.0] 1\n" in lines
            assert listens_at(process.pid) <= LOOPBACK
        finally:
            process.kill()


class Trap:
    """What runs when somebody unpickles it."""

    def __reduce__(self):
        return os.write, (2, b"ran")


class Ranks:
    """Two ranks, of which the other one sends what it likes."""

    def __init__(self, sent: bytes):
        self.sent = sent

    def all_gather(self, into, own, group):
        into[0].copy_(own)
        sent = [len(self.sent)] if own.dtype is torch.int64 else list(self.sent.ljust(len(own))[: len(own)])
        into[1].copy_(torch.tensor(sent))


@pytest.fixture
def among(monkeypatch):
    """Two ranks, this one the first; the other sends the bytes given."""

    def make(sent):
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        monkeypatch.setattr(dist, "get_rank", lambda group: 1)
        monkeypatch.setattr(dist, "all_gather", Ranks(sent).all_gather)

    return make


def test_values_come_as_they_were(among):
    among(b'{"a": [1, null, "\\u00e9"]}')
    assert tell_all(["x", 1.5, None], None) == [["x", 1.5, None], {"a": [1, None, "é"]}]
    assert told_by_first("mine", None) is None  # this is the second


def test_what_a_rank_sends_is_not_run(among, capfd):
    among(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"decode|Expecting"):
        tell_all("x" * 100, None)
    assert "ran" not in capfd.readouterr().err


def test_parts_are_traded_with_receives_first(monkeypatch):
    """The first of three ranks; the second gets nothing from it, and this one nothing from the third."""
    begun, waited = [], []

    def begin(operations):
        for operation, part, peer in operations:
            begun.append((operation.__name__, peer))
            if operation is dist.irecv:
                part.fill_(10 + peer)
        return [SimpleNamespace(wait=lambda: waited.append(1)) for _ in operations]

    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "P2POp", lambda operation, part, group, group_peer: (operation, part, group_peer))
    monkeypatch.setattr(dist, "batch_isend_irecv", begin)
    sent = [torch.ones(2), torch.empty(0), torch.ones(3)]
    received = [torch.zeros(2), torch.zeros(2), torch.empty(0)]
    trade(sent, received, None)
    assert begun == [("irecv", 1), ("isend", 2)]
    assert len(waited) == 2
    assert [part.tolist() for part in received] == [[1, 1], [11, 11], []]
