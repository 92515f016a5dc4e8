"""Ranks meet and watch one another, as processes of this machine with nothing but a store between them."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import CONTEXT
from ports import free_port

from fft.errors import UserError
from fft.parallel import interfaces
from fft.training import meeting as meeting_module
from fft.training.meeting import Meeting, meet
from fft.training.watch import Watch


def test_addresses_of_this_machine():
    assert interfaces.address_towards("127.0.0.1") == "127.0.0.1"
    assert interfaces.interface_of("127.0.0.1") == interfaces.interface_of("127.0.1.1") == "lo"
    assert interfaces.interface_of("192.0.2.1") is None
    assert interfaces.interface_address("lo,eth9") == "127.0.0.1"
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME is eth9, and .* has no such interface .* it has lo"):
        interfaces.interface_address("eth9")
    with pytest.raises(OSError, match=r"(?i)name"):
        interfaces.address_towards("no-such-name.invalid")


def test_a_world_of_one_meets_nobody():
    meeting = meet(1)
    assert (len(meeting.peers), meeting.here, meeting.links) == (1, [meeting.own], {})
    let_go = []
    with Watch(meeting, 5) as watch:
        watch.held.callback(lambda: let_go.append(True))
    assert let_go == [True]


def rank_of(act, rank, world, port, file):
    """A rank that watches, acts and ends; what it prints goes to ``file``."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with Watch(meet(world), 5) as watch:
        watch.held.callback(lambda: os.write(2, f"let go {rank}\n".encode()))
        act(rank, watch.meeting)


def ended(act, tmp_path, world=3):
    """Exit codes of ranks, and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "log"
    ranks = [CONTEXT.Process(target=rank_of, args=(act, rank, world, port, file)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in (ranks[2], ranks[0]):
        rank.join(60)
    for rank in ranks:  # the one between them may be stopped
        rank.join(5)
        rank.kill()
        rank.join()
    said = [line for line in file.read_text().splitlines() if line.startswith(("error", "warning", "let go"))]
    return [rank.exitcode for rank in ranks], said


def listens_at(port: int) -> set[str]:
    """Addresses of this machine, as the system writes them, at which somebody listens at a port."""
    lines = [line for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    local = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    return {address.partition(":")[0] for address in local if address.endswith(f":{port:04X}")}


def nothing(rank: int, meeting: Meeting) -> None:
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert [peer.rank for peer in meeting.here] == [0, 1, 2]
    assert sorted(meeting.links) == ([1, 2] if rank == 0 else [0])
    assert listens_at(int(os.environ["MASTER_PORT"])) == {"0100007F"}
    assert meeting.store is not None
    meeting.store.add("met", 1)  # rank 0, with the store, is not to be gone before all have come here
    while rank == 0 and meeting.store.add("met", 0) < 3:
        time.sleep(0.01)


def refuses(rank: int, meeting: Meeting) -> None:
    if rank == 2:
        raise UserError("the second disk is full: make room.")
    time.sleep(60)


def breaks(rank: int, meeting: Meeting) -> None:
    if rank == 1:
        raise ValueError("a number")
    time.sleep(60)


def first_refuses(rank: int, meeting: Meeting) -> None:
    if rank == 0:
        raise UserError("no such table.")
    time.sleep(60)


def dies(rank: int, meeting: Meeting) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def first_dies(rank: int, meeting: Meeting) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stops(rank: int, meeting: Meeting) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def comes(rank, world, port, file):
    """A rank; the first waits 2 s for the others, which look for that one longer: it may still be starting."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.write(2, f"rank {rank} looks for the others\n".encode())
    try:
        meet(world, 2 if rank == 0 else 60)
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(2)


def test_ranks_that_do_not_come_are_named(tmp_path):
    port, file = free_port(), tmp_path / "log"
    ranks = [CONTEXT.Process(target=comes, args=(rank, 4, port, file)) for rank in (2, 0)]
    for number, rank in zip((2, 0), ranks, strict=True):
        rank.start()
        while not file.exists() or f"rank {number} looks" not in file.read_text():
            assert rank.exitcode is None
            time.sleep(0.02)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [2, 2]
    sentence = (
        "ranks 1, 3 of 4 did not come within 2 s: see the logs of the machines that are to start them, and whether "
        f"they reach 127.0.0.1 (MASTER_ADDR), port {port}."
    )
    assert file.read_text().splitlines()[2:] == [f"error: {sentence}"] * 2


def test_the_store_listens_where_the_others_look_for_it(monkeypatch):
    def at(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    def listens(host):
        listener = meeting_module._listener((host, 0), 2)
        with listener or contextlib.nullcontext():
            return listener and listener.getsockname()[0]

    own = interfaces.address_towards("192.0.2.1")
    at(own)
    assert listens("first") == own
    at("192.0.2.1")  # translated on the way
    assert listens("first") is None
    at(own, "192.0.2.1")
    assert listens("first") is None
    at("127.0.1.1")  # Debian's own name, which others know by another address
    assert listens("first") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert listens("first") == "127.0.1.1"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    at("127.0.0.1")
    assert listens("127.0.0.1") == listens("localhost") == "127.0.0.1"


def test_ranks_that_end_well_say_nothing(tmp_path):
    codes, said = ended(nothing, tmp_path)
    assert codes == [0, 0, 0]
    assert sorted(said) == ["let go 0", "let go 1", "let go 2"]


@pytest.mark.parametrize(
    ("act", "codes", "sentence"),
    [
        (refuses, [2, 2, 2], "the second disk is full: make room."),
        (first_refuses, [2, 2, 2], "no such table."),
        (breaks, [1, 1, 1], "rank 1 (on HOST) has ended with ValueError (a number); see its log."),
        (dies, [75, -9, 75], "rank 1 (on HOST) has ended without a word; the same command with --resume auto goes on"),
        (first_dies, [-9, 75, 75], "rank 0 (on HOST) has ended without a word; the same command with --resume"),
        (stops, [75, -9, 75], "rank 1 (on HOST) has said nothing for 5 s (--timeout); the same command with --resume"),
    ],
)
def test_what_ends_a_rank_ends_all_with_its_sentence(act, codes, sentence, tmp_path):
    found, said = ended(act, tmp_path)
    assert found == codes
    errors = [line for line in said if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {sentence.replace('HOST', socket.gethostname())}")
    assert f"let go {codes.index(max(codes))}" in said
