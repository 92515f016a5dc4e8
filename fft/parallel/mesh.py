"""World = data x pipe x sequence x tensor: sizes, checked before anything is launched, and which rank sits where."""

from dataclasses import dataclass
from itertools import product

from fft.errors import UserError


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each dimension; their product is the world."""

    data: int
    pipe: int
    sequence: int = 1
    tensor: int = 1
    #: Neighbours among the ranks of data x sequence that share a layer's experts; no dimension of its own.
    expert: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.pipe * self.sequence * self.tensor

    def rank(self, pipe: int, data: int, sequence: int, tensor: int) -> int:
        """Global rank at a place. Tensor ranks are neighbours, then sequence ranks; stages lie farthest apart.

        It is the order of DeepSpeed's topology of pipe, data and model, sequence being the inner part of its data axis.
        """
        return ((pipe * self.data + data) * self.sequence + sequence) * self.tensor + tensor

    def sequence_groups(self) -> list[list[int]]:
        """Global ranks that share the tokens of a replica's rows."""
        coordinates = product(range(self.pipe), range(self.data), range(self.tensor))
        return [[self.rank(p, d, s, t) for s in range(self.sequence)] for p, d, t in coordinates]

    def tower_groups(self) -> list[list[int]]:
        """Global ranks that encode the images of a replica together: of all stages, those first that share the first's
        tokens."""
        return [
            [self.rank(p, d, s, t) for p in range(self.pipe) for s in range(self.sequence)]
            for d, t in product(range(self.data), range(self.tensor))
        ]

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks that share the parameters of a stage."""
        coordinates = product(range(self.pipe), range(self.data), range(self.sequence))
        return [[self.rank(p, d, s, t) for t in range(self.tensor)] for p, d, s in coordinates]

    def expert_groups(self) -> list[list[int]]:
        """Global ranks that have the experts of a layer together, each some, and exchange tokens."""
        return [group for axis in self._replicas() for group in _stretches(axis, self.expert)]

    def expert_data_groups(self) -> list[list[int]]:
        """Global ranks that have the same experts, and sum up their gradients."""
        return [axis[expert :: self.expert] for axis in self._replicas() for expert in range(self.expert)]

    def holder_groups(self) -> list[list[int]]:
        """Global ranks that have a stage's parameters together: of every expert group, all tensor ranks."""
        stage = self.data * self.sequence * self.tensor
        stages = [list(range(first, first + stage)) for first in range(0, self.world, stage)]
        return [group for ranks in stages for group in _stretches(ranks, self.expert * self.tensor)]

    def _replicas(self) -> list[list[int]]:
        """Global ranks of data x sequence, for every stage and place among the tensor ranks."""
        places = list(product(range(self.data), range(self.sequence)))
        stages = product(range(self.pipe), range(self.tensor))
        return [[self.rank(pipe, *place, tensor) for place in places] for pipe, tensor in stages]


def _stretches(ranks: list[int], size: int) -> list[list[int]]:
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def mesh_sizes(world: int, pipe: int, sequence: int, tensor: int, expert: int = 1) -> MeshSizes:
    """Derive the data-parallel size from what is left. Raises :class:`UserError` for impossible sizes."""
    for flag, size in (("pipe", pipe), ("sequence", sequence), ("model", tensor), ("expert", expert)):
        if size < 1:
            raise UserError(f"--{flag}_parallel_size {size} must be at least 1.")
    model = pipe * sequence * tensor
    if world % model:
        fitting = [p for p in range(1, world + 1) if world % (p * sequence * tensor) == 0]
        by = f"--pipe_parallel_size {pipe}"
        by += f" x --sequence_parallel_size {sequence}" if sequence > 1 else ""
        by += f" x --model_parallel_size {tensor}" if tensor > 1 else ""
        instead = f", or use a pipe size of {' or '.join(map(str, fitting))}" if fitting else ""
        raise UserError(
            f"the world of {world} rank(s) cannot be divided by {by}: start a multiple of {model} ranks{instead}."
        )
    replicas = world // (pipe * tensor)
    if replicas % expert:
        fitting = [n for n in range(1, replicas + 1) if replicas % n == 0]
        raise UserError(
            f"--expert_parallel_size {expert} must divide the {replicas} rank(s) of data x sequence parallel: use "
            f"{' or '.join(map(str, fitting))}, or start more ranks."
        )
    return MeshSizes(world // model, pipe, sequence, tensor, expert)
