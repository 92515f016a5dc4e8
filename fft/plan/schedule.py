"""A step of a pipeline, played through: which stage computes, sends and waits, when."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

#: What a rank does: "forward" or "backward" of a chunk of layers, or a send or receive of states or gradients.
FORWARD, BACKWARD, SEND, RECEIVE = "forward", "backward", "send", "receive"


@dataclass(frozen=True)
class Task:
    """Of a rank: ``kind``, the micro-batch, the chunk of the rank's layers, and for messages the other rank.

    ``tick`` numbers turns of a schedule.
    """

    kind: str
    micro: int
    chunk: int = 0
    peer: int = 0
    back: bool = False
    tick: int = 0


@dataclass(frozen=True)
class Played:
    """``seconds`` of a step, and, of each rank, when it did what (task, begin, end)."""

    seconds: float
    spans: list[list[tuple[Task, float, float]]] = field(repr=False, default_factory=list)


@lru_cache(maxsize=64)
def deepspeed_orders(stages: int, micros: int) -> tuple[tuple[Task, ...], ...]:
    """What the ranks do in DeepSpeed's ``TrainSchedule``, its sends and receives among it."""
    return tuple(_deepspeed_order(stage, stages, micros) for stage in range(stages))


def _deepspeed_order(stage: int, stages: int, micros: int) -> tuple[Task, ...]:
    tasks: list[Task] = []
    before = -1

    def valid(micro: int) -> bool:
        return 0 <= micro < micros

    for step in range(2 * (micros + stages - 1)):
        forward = step % 2 == stage % 2
        if forward:
            micro = step // 2 - stage // 2
        elif step % 2 == 0:
            micro = step // 2 - stages + (stage + 1) // 2
        else:
            micro = (step - 1) // 2 - stages + 1 + stage // 2
        if forward and stage > 0:
            if valid(before):
                tasks.append(Task(SEND, before, peer=stage - 1, back=True, tick=step))
            if valid(micro):
                tasks.append(Task(RECEIVE, micro, peer=stage - 1, tick=step))
        if not forward and stage < stages - 1:
            if valid(micro):
                tasks.append(Task(RECEIVE, micro, peer=stage + 1, back=True, tick=step))
            if valid(before):
                tasks.append(Task(SEND, before, peer=stage + 1, tick=step))
        if valid(micro):
            tasks.append(Task(FORWARD if forward else BACKWARD, micro, tick=step))
        before = micro
    return tuple(tasks)


@lru_cache(maxsize=64)
def megatron_orders(stages: int, micros: int, chunks: int) -> tuple[tuple[Task, ...], ...]:
    """Forwards and backwards of 1F1B, interleaved where ranks have several ``chunks`` of the layers."""
    return tuple(_megatron_order(stage, stages, micros, chunks) for stage in range(stages))


def _megatron_order(stage: int, stages: int, micros: int, chunks: int) -> tuple[Task, ...]:
    total = micros * chunks
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, total)

    def placed(kind: str) -> list[Task]:
        tasks = []
        for first in range(0, micros, stages):
            group = range(first, min(first + stages, micros))
            for chunk in range(chunks):
                own = chunk if kind == FORWARD else chunks - 1 - chunk
                tasks += [Task(kind, micro, own) for micro in group]
        return tasks

    forwards, backwards = placed(FORWARD), placed(BACKWARD)
    tasks = forwards[:ahead]
    for number in range(total - ahead):
        tasks += [forwards[ahead + number], backwards[number]]
    return tuple(tasks + backwards[total - ahead :])


def play_blocking(
    forward: Sequence[float], backward: Sequence[float], send: Sequence[float], micros: int, paired: bool = False
) -> Played:
    """DeepSpeed's step: a message takes both ranks for as long as it takes, and begins when both have come to it.

    ``send[i]`` seconds of a message between stages i and i + 1. If messages are ``paired``, those of a turn, which are
    with one neighbour, go at the same time, one in each direction.
    """
    stages = len(forward)
    orders = deepspeed_orders(stages, micros)
    now, at = [0.0] * stages, [0] * stages
    spans: list[list[tuple[Task, float, float]]] = [[] for _ in range(stages)]
    ready = list(range(stages))
    while ready:
        stage = ready.pop()
        order = orders[stage]
        while at[stage] < len(order):
            task = order[at[stage]]
            if task.kind in (FORWARD, BACKWARD):
                begin = now[stage]
                now[stage] = begin + (forward if task.kind == FORWARD else backward)[stage]
                spans[stage].append((task, begin, now[stage]))
                at[stage] += 1
                continue
            peer = task.peer
            if at[peer] >= len(orders[peer]):
                break
            other = orders[peer][at[peer]]
            if other.kind not in (SEND, RECEIVE) or other.peer != stage or other.kind == task.kind:
                break
            begin = max(now[stage], now[peer])
            end = begin + send[min(stage, peer)]
            both = 2 if paired and _turns(order, at[stage]) else 1
            for rank in (stage, peer):
                spans[rank] += [(own, begin, end) for own in orders[rank][at[rank] : at[rank] + both]]
                now[rank] = end
                at[rank] += both
            ready.append(peer)
    return Played(max(now), spans)


def _turns(order: Sequence[Task], at: int) -> bool:
    """Whether the message after that one is of the same turn; the neighbour then has both, too."""
    return at + 1 < len(order) and order[at + 1].tick == order[at].tick and order[at + 1].kind in (SEND, RECEIVE)


def play_eager(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], send: Sequence[float], micros: int
) -> Played:
    """1F1B whose messages are on their way while ranks go on; ``forward[rank][chunk]`` seconds of a pass.

    A message takes its receiver's time, and comes ``send`` seconds after it was ready. Chunk c of the last rank is
    followed by chunk c + 1 of the first.
    """
    stages, chunks = len(forward), len(forward[0])
    orders = megatron_orders(stages, micros, chunks)
    done: dict[tuple[bool, int, int, int], float] = {}
    now, at = [0.0] * stages, [0] * stages
    spans: list[list[tuple[Task, float, float]]] = [[] for _ in range(stages)]
    ready = list(range(stages))
    while ready:
        rank = ready.pop()
        order = orders[rank]
        while at[rank] < len(order):
            task = order[at[rank]]
            back = task.kind == BACKWARD
            needed = _needed(rank, task, stages, chunks)
            begin = now[rank]
            if needed is not None:
                if needed not in done:
                    break
                wait = send[min(rank, needed[1]) if abs(rank - needed[1]) == 1 else -1] if needed[1] != rank else 0.0
                begin = max(begin, done[needed]) + wait
            end = begin + (backward if back else forward)[rank][task.chunk]
            spans[rank].append((task, begin, end))
            done[back, rank, task.chunk, task.micro] = now[rank] = end
            at[rank] += 1
            follower = (rank + (-1 if back else 1)) % stages
            if follower != rank:
                ready.append(follower)
    return Played(max(now), spans)


def _needed(rank: int, task: Task, stages: int, chunks: int) -> tuple[bool, int, int, int] | None:
    """The pass whose result a task takes: backward?, rank, chunk, micro-batch."""
    if task.kind == FORWARD:
        if rank > 0:
            return (False, rank - 1, task.chunk, task.micro)
        return (False, stages - 1, task.chunk - 1, task.micro) if task.chunk else None
    if rank < stages - 1:
        return (True, rank + 1, task.chunk, task.micro)
    if task.chunk < chunks - 1:
        return (True, 0, task.chunk + 1, task.micro)
    return (False, rank, task.chunk, task.micro)
