"""What one rank of a mesh does in a run, a pure function of its number."""

from dataclasses import dataclass

from fft.parallel.mesh import MeshSizes


@dataclass(frozen=True)
class StageRole:
    """A rank's place: its pipeline stage, its data-parallel replica, and its places among those that share a row's
    tokens (``sequence``) and a layer's parameters (``tensor``)."""

    mesh: MeshSizes
    stage: int
    replica: int
    sequence: int
    tensor: int

    @classmethod
    def of(cls, mesh: MeshSizes, rank: int) -> "StageRole":
        """The inverse of :meth:`MeshSizes.rank`."""
        rank, tensor = divmod(rank, mesh.tensor)
        rank, sequence = divmod(rank, mesh.sequence)
        return cls(mesh, *divmod(rank, mesh.data), sequence, tensor)

    @property
    def first(self) -> bool:
        """Whether it has the first stage, which takes ids."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it has the last stage, which takes labels and computes losses."""
        return self.stage == self.mesh.pipe - 1

    @property
    def reads(self) -> bool:
        """Whether it needs data at all."""
        return self.first or self.last

    @property
    def leads(self) -> bool:
        """Whether it is the one, of those that share a layer's parameters, that speaks for what all of them have."""
        return self.tensor == 0

    @property
    def counts(self) -> bool:
        """Whether it is the one, of those that compute with the same tokens, that counts them."""
        return self.last and self.leads

    @property
    def place(self) -> int:
        """Its place among the ranks of data x sequence."""
        return self.replica * self.mesh.sequence + self.sequence

    @property
    def writes(self) -> bool:
        """Whether it is of the ranks that write the weights, which all replicas have: the first expert group's."""
        return self.place < self.mesh.expert

    @property
    def shard(self) -> int:
        """The file of weights that it writes, counted from 0."""
        return (self.stage * self.mesh.expert + self.place) * self.mesh.tensor + self.tensor

    @property
    def shards(self) -> int:
        """Files of weights that make a model: one for each stage, expert- and tensor-parallel rank."""
        return self.mesh.pipe * self.mesh.expert * self.mesh.tensor
