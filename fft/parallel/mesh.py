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

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks that share the parameters of a stage."""
        coordinates = product(range(self.pipe), range(self.data), range(self.sequence))
        return [[self.rank(p, d, s, t) for t in range(self.tensor)] for p, d, s in coordinates]


def mesh_sizes(world: int, pipe: int, sequence: int, tensor: int) -> MeshSizes:
    """Derive the data-parallel size from what is left. Raises :class:`UserError` for impossible sizes."""
    for flag, size in (("pipe", pipe), ("sequence", sequence), ("model", tensor)):
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
    return MeshSizes(world // model, pipe, sequence, tensor)
