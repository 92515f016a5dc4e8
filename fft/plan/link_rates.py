"""What links between ranks reach, measured: messages to a neighbour and sums over a group, by their size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

#: Bytes that are sent; seconds that the largest may take, and that those of one size may, unless they are the fewest.
_SIZES = (64, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
_LONGEST, _LONG, _FEWEST, _MOST = 2.5, 0.5, 2, 15
#: Seconds of computing before each exchange: runs compute, too, and a link that rested may carry a burst at once.
_PAUSE = 0.005


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds of an exchange of ``size`` bytes."""

    size: int
    seconds: float


@dataclass(frozen=True)
class LinkTimes:
    """Of ``ranks`` that exchange at the same time, by size: messages both ways, all-reduces, all-gathers to a size."""

    ranks: int
    messages: tuple[ExchangeTime, ...]
    sums: tuple[ExchangeTime, ...]
    gathers: tuple[ExchangeTime, ...]

    @property
    def message(self) -> tuple[float, float]:
        """Seconds of a message of no size, and bytes a second, of a rank in one direction."""
        return line([(one.size, one.seconds) for one in self.messages])

    @property
    def summing(self) -> tuple[float, float]:
        """The same of the hops of an all-reduce, of which there are two for each doubling of the ranks; of bytes that
        each rank must get.
        """
        share = 2 * (self.ranks - 1) / self.ranks
        latency, bandwidth = line([(one.size * share, one.seconds) for one in self.sums])
        return latency / 2 / log2(self.ranks), bandwidth

    @property
    def gathering(self) -> float:
        """Bytes a second that each rank gets in an all-gather."""
        share = (self.ranks - 1) / self.ranks
        return line([(one.size * share, one.seconds) for one in self.gathers])[1]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency and bandwidth of (bytes, seconds): the time of the smallest, and the rate that fits what is beyond it.

    Squares of what is off count by the inverse of the seconds: the larger more, but not the largest alone.
    """
    _, latency = min(points)
    beyond = [(size, max(0.0, seconds - latency), 1 / seconds) for size, seconds in points]
    slope = sum(w * size * more for size, more, w in beyond) / sum(w * size**2 for size, _, w in beyond)
    return latency, 1 / max(slope, 1e-15)


def link_times(group: dist.ProcessGroup, device: torch.device, largest: int = _SIZES[-1]) -> LinkTimes:
    """Of a group of ranks: each sends to the next and gets from the one before; all sum up; all gather. Collective.

    Exchanges have ``largest`` bytes at most.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (rank + 1) % size, (rank - 1) % size
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

    def message(sent: Tensor, received: Tensor) -> None:
        pairs = ((dist.irecv, received, before), (dist.isend, sent, after))  # as fft.parallel.groups.trade
        operations = [dist.P2POp(kind, tensor, group=group, group_peer=peer) for kind, tensor, peer in pairs]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    def summing(sent: Tensor, _: Tensor) -> None:
        dist.all_reduce(sent, group=group)

    def gathering(sent: Tensor, received: Tensor) -> None:
        count = sent.numel() // size
        gather(received[: count * size], sent[:count], group=group)

    sizes = [some for some in _SIZES if some <= largest]
    return LinkTimes(size, *(_by_size(kind, sizes, group, device) for kind in (message, summing, gathering)))


def _by_size(
    exchange: Callable[[Tensor, Tensor], None], sizes: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> tuple[ExchangeTime, ...]:
    found = []
    for size in sizes:
        sent, received = (torch.zeros(size // 4, device=device) for _ in range(2))
        seconds = _slowest(exchange, sent, received, 1, group)
        count = max(_FEWEST, min(_MOST, int(_LONG / seconds)))
        found.append(ExchangeTime(size, _slowest(exchange, sent, received, count, group)))
        if 4 * found[-1].seconds > _LONGEST:
            break
    return tuple(found)


def _slowest(
    exchange: Callable[[Tensor, Tensor], None], sent: Tensor, received: Tensor, count: int, group: dist.ProcessGroup
) -> float:
    """The median of so many exchanges, each as long as its slowest rank's. Collective."""
    taken, ready = torch.zeros(count, device=sent.device), sent.new_zeros(1)
    for index in range(count):
        dist.all_reduce(ready, group=group)
        float(ready)
        end = time.perf_counter() + _PAUSE
        while time.perf_counter() < end:
            pass
        begin = time.perf_counter()
        exchange(sent, received)
        if sent.device.type != "cpu":
            torch.accelerator.synchronize(sent.device)
        taken[index] = time.perf_counter() - begin
    dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
    return median(taken.tolist())
