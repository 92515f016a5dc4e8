"""How long exchanges take: a latency for each hop, and bytes over the narrowest link, which others use as well."""

from dataclasses import dataclass, replace
from math import log2

from fft.plan.constants import Constants
from fft.plan.hardware import Machine


@dataclass(frozen=True)
class Group:
    """``size`` ranks that exchange something, ``stride`` apart, of which each node has ``inside``.

    All other ranks of a node are in groups of the same form, which exchange at the same time over the same links.
    """

    size: int
    stride: int
    inside: int

    @property
    def nodes(self) -> float:
        """How many nodes it spans."""
        return self.size / self.inside


def group_of(machine: Machine, size: int, stride: int) -> Group:
    """A group whose ranks are ``stride`` apart, in the order of ranks over nodes."""
    return Group(size, stride, max(1, min(size, machine.node // stride)))


def crossings(machine: Machine, reach: int, stride: int) -> int:
    """How many messages share the way out of a switch, where each of a node's devices sends ``stride`` further.

    ``reach`` is how far the last of a group is from the first: groups of one switch leave it alone.
    """
    return min(stride, machine.inside.sharing) if reach >= machine.inside.sharing else 1


def _seconds_per_byte(machine: Machine, group: Group, at: Constants) -> float:
    """Of what every rank of a group must get past its narrowest link."""
    inside = 0.0
    if group.inside > 1:
        inside = crossings(machine, (group.inside - 1) * group.stride, group.stride) / machine.inside.bandwidth
    if group.nodes <= 1:
        return inside
    return max(inside, machine.node / group.inside / (machine.between.bandwidth * at.network))


def _latency(machine: Machine, group: Group) -> float:
    hops = log2(group.inside) * machine.inside.latency if group.inside > 1 else 0.0
    return hops + (log2(group.nodes) * machine.between.latency if group.nodes > 1 else 0.0)


def gather_time(machine: Machine, group: Group, size: float, at: Constants) -> float:
    """Seconds of an all-gather to ``size`` bytes, or of a reduce-scatter of as many."""
    if group.size == 1 or not size:
        return 0.0
    share = size * (group.size - 1) / group.size
    return share * _seconds_per_byte(machine, group, at) + _latency(machine, group)


def reduce_time(machine: Machine, group: Group, size: float, at: Constants) -> float:
    """Seconds of an all-reduce of ``size`` bytes: a reduce-scatter, then an all-gather."""
    if group.size == 1 or not size:
        return 0.0
    share = size * (group.size - 1) / group.size / at.summing
    return 2 * (share * _seconds_per_byte(machine, group, at) + _latency(machine, group))


def scatter_time(machine: Machine, group: Group, size: float, at: Constants) -> float:
    """Seconds of a reduce-scatter of ``size`` bytes by messages, of which each rank sends one to each other one."""
    return gather_time(machine, group, size, replace(at, network=at.wire))


def all_to_all_time(machine: Machine, group: Group, size: float, at: Constants) -> float:
    """Seconds of an all-to-all, to which each rank gives ``size`` bytes."""
    if group.size == 1 or not size:
        return 0.0
    within = size * (group.inside - 1) / group.size * machine.inside.sharing / machine.inside.bandwidth
    out = size * (group.size - group.inside) / group.size
    between = out * machine.node / (machine.between.bandwidth * at.network)
    return max(within, between) + _latency(machine, group)


def send_time(machine: Machine, size: float, stride: int, at: Constants) -> float:
    """Seconds of a message to the rank ``stride`` further, while all ranks of the node send one."""
    if stride >= machine.node:
        return size * machine.node / (machine.between.bandwidth * at.wire) + machine.between.latency
    return size * crossings(machine, stride, stride) / machine.inside.bandwidth + machine.inside.latency
