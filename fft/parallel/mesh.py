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
    if tensor > 1:
        raise UserError(
            f"--model_parallel_size {tensor}: this release has no tensor parallelism; set it to 1 and raise "
            "--pipe_parallel_size instead."
        )
    model = pipe * sequence * tensor
    if world % model:
        fitting = [p for p in range(1, world + 1) if world % (p * sequence * tensor) == 0]
        by = f"--pipe_parallel_size {pipe}"
        by += f" x --sequence_parallel_size {sequence}" if sequence > 1 else ""
        instead = f", or use a pipe size of {' or '.join(map(str, fitting))}" if fitting else ""
        raise UserError(
            f"the world of {world} rank(s) cannot be divided by {by}: start a multiple of {model} ranks{instead}."
        )
    return MeshSizes(world // model, pipe, sequence, tensor)
