"""One way to lay a run out, and all ways there are."""

from collections.abc import Iterator
from dataclasses import dataclass

from fft.plan.hardware import Machine
from fft.plan.run import EVERYTHING, NOTHING, Again, Sides

#: What is tried: samples of a micro-batch, and what backward computes again ("none", "selective", every k layers).
MICROS, RECOMPUTED = (1, 2, 4, 8), ("none", "selective", 1, 2, 4)


@dataclass(frozen=True)
class LayoutChoice:
    """Sizes of a layout and the settings that go with it; ``recompute`` is one of :data:`RECOMPUTED`."""

    data: int
    pipe: int
    sequence: int
    ulysses: int
    tensor: int
    expert: int
    micro: int
    accumulated: int
    recompute: str | int = "none"
    split: bool = False
    offload: bool = False

    @property
    def sides(self) -> Sides:
        """As a run has them."""
        return Sides(self.data, self.pipe, self.sequence, self.tensor, self.ulysses, self.expert)

    @property
    def family(self) -> tuple[int, ...]:
        """What makes it another layout, and not a variant of one."""
        return self.data, self.pipe, self.sequence, self.ulysses, self.tensor, self.expert

    @property
    def again(self) -> Again:
        """What backward computes again."""
        if self.recompute == "none":
            return NOTHING
        return Again(others=1.0) if self.recompute == "selective" else EVERYTHING


@dataclass(frozen=True)
class Limits:
    """What sizes can be: heads, layers and experts of a model, and how many tokens a step has."""

    heads: int
    kv_heads: int
    layers: int
    experts: int
    seq: int
    step_tokens: int


def divisors(number: int) -> list[int]:
    """All, from 1."""
    return [size for size in range(1, number + 1) if number % size == 0] if number else [1]


def choices(machine: Machine, ranks: int, limits: Limits) -> Iterator[LayoutChoice]:
    """Every way to lay ``ranks`` out. Tensor ranks are those of one node; splitting layers is tried for few a stage."""
    for tensor in divisors(limits.heads):
        if ranks % tensor or tensor > machine.node:
            continue
        for pipe in divisors(ranks // tensor):
            if pipe > limits.layers:
                break
            for sequence in divisors(ranks // tensor // pipe):
                if limits.seq % sequence or limits.seq // sequence < 512:
                    continue
                yield from _inside(limits, ranks // tensor // pipe // sequence, pipe, sequence, tensor)


def _inside(limits: Limits, data: int, pipe: int, sequence: int, tensor: int) -> Iterator[LayoutChoice]:
    kv_heads = max(1, limits.kv_heads // tensor)
    experts = [e for e in divisors(limits.experts) if data * sequence % e == 0]
    splits = (False, True) if pipe > 1 and limits.layers < 6 * pipe else (False,)
    for micro in MICROS:
        whole = limits.seq * micro * data
        if limits.step_tokens % whole:
            continue
        accumulated = limits.step_tokens // whole
        for ulysses in (size for size in divisors(sequence) if kv_heads % size == 0):
            for expert in experts:
                for recompute in RECOMPUTED:
                    for split in splits:
                        for offload in (False, True):
                            yield LayoutChoice(
                                data,
                                pipe,
                                sequence,
                                ulysses,
                                tensor,
                                expert,
                                micro,
                                accumulated,
                                recompute,
                                split,
                                offload,
                            )
