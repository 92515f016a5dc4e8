"""World = data x pipe x sequence x tensor: sizes, checked before anything is launched."""

from dataclasses import dataclass

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


def mesh_sizes(world: int, pipe: int, sequence: int, tensor: int) -> MeshSizes:
    """Derive the data-parallel size from what is left. Raises :class:`UserError` for impossible sizes."""
    for flag, size in (("pipe", pipe), ("sequence", sequence), ("model", tensor)):
        if size < 1:
            raise UserError(f"--{flag}_parallel_size {size} must be at least 1.")
    for flag, size in (("sequence", sequence), ("model", tensor)):
        if size > 1:
            raise UserError(
                f"--{flag}_parallel_size {size}: this release trains over data and pipe only; set it to 1 "
                "and raise --pipe_parallel_size instead."
            )
    model = pipe * sequence * tensor
    if world % model:
        fitting = [p for p in range(1, world + 1) if world % (p * sequence * tensor) == 0]
        raise UserError(
            f"the world of {world} rank(s) cannot be divided by --pipe_parallel_size {pipe}: "
            f"start a multiple of {model} ranks, or use a pipe size of {' or '.join(map(str, fitting))}."
        )
    return MeshSizes(world // model, pipe, sequence, tensor)
