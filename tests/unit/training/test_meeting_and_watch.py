"""Ranks meet and watch one another, as processes of this machine with nothing but a store between them."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from fft.errors import UserError
from fft.parallel import interfaces
from fft.training.meeting import Meeting, meet
from fft.training.watch import Watch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fft.training.watch"])


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
    ranks = [_CONTEXT.Process(target=rank_of, args=(act, rank, world, port, file)) for rank in range(world)]
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


def nothing(rank: int, meeting: Meeting) -> None:
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert [peer.rank for peer in meeting.here] == [0, 1, 2]
    assert sorted(meeting.links) == ([1, 2] if rank == 0 else [0])
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
