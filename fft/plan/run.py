"""A run to be predicted: a model on a machine in a layout, by some software."""

from dataclasses import dataclass, field
from functools import cached_property

from fft.plan.constants import FITTED_CONSTANTS, Constants
from fft.plan.exchanges import Group, group_of
from fft.plan.hardware import Machine
from fft.plan.shape import Shape
from fft.plan.stack import Stack


@dataclass(frozen=True)
class Again:
    """What backward computes again: shares of a layer's products, attention, other kernels, and exchanges."""

    products: float = 0.0
    attention: float = 0.0
    others: float = 0.0
    exchanges: float = 0.0


NOTHING, EVERYTHING = Again(), Again(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Sides:
    """world = data x pipe x sequence x tensor; sequence = ring x ``ulysses``; ``expert`` ranks share experts out.

    Each rank has ``chunks`` stretches of layers, where stages are interleaved. Ranks are laid over nodes tensor
    first, then sequence, data, pipe.
    """

    data: int = 1
    pipe: int = 1
    sequence: int = 1
    tensor: int = 1
    ulysses: int = 1
    expert: int = 1
    chunks: int = 1

    @property
    def world(self) -> int:
        """How many devices."""
        return self.data * self.pipe * self.sequence * self.tensor


@dataclass(frozen=True)
class PlannedRun:
    """``micro`` samples of ``seq`` tokens are a micro-batch, ``accumulated`` of these a replica's step.

    ``bounds`` cut the layers of the shape, with embedding first and norm and head last, into pipe x chunks stretches
    (None: as evenly as decoder layers go). ``attended`` is the length of documents, if not ``seq``.
    """

    machine: Machine
    shape: Shape
    sides: Sides
    stack: Stack
    seq: int
    micro: int
    accumulated: int
    again: Again = NOTHING
    bounds: tuple[int, ...] | None = None
    offload: bool = False
    attended: int = 0
    at: Constants = field(default=FITTED_CONSTANTS)

    @property
    def tokens(self) -> int:
        """Of a rank, a micro-batch."""
        return self.micro * self.seq // self.sides.sequence

    @property
    def step_tokens(self) -> int:
        """Of all replicas."""
        return self.micro * self.seq * self.accumulated * self.sides.data

    @property
    def document(self) -> int:
        """Tokens that attend to one another."""
        return self.attended or self.seq

    @cached_property
    def tensor_group(self) -> Group:
        """Ranks that share a layer."""
        return group_of(self.machine, self.sides.tensor, 1)

    @cached_property
    def sequence_group(self) -> Group:
        """Ranks that share a row."""
        return group_of(self.machine, self.sides.sequence, self.sides.tensor)

    @cached_property
    def replica_group(self) -> Group:
        """Ranks that reduce gradients: data x sequence."""
        return group_of(self.machine, self.sides.data * self.sides.sequence, self.sides.tensor)

    @property
    def pipe_stride(self) -> int:
        """How far the next stage is."""
        return self.sides.tensor * self.sides.sequence * self.sides.data
