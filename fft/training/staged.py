"""The layers of a model as stages of DeepSpeed's pipeline."""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import torch
from deepspeed import PipelineEngine
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from fft.models.carried import packed, unpacked
from fft.models.layers import PipelineLayer
from fft.models.vision_layers import HeldTower
from fft.parallel.mesh import MeshSizes
from fft.training.shared_tower import SharedTower


class StagedModel(PipelineModule):
    """A :class:`PipelineModule` whose stage bounds are given, so that no rank builds layers it does not keep.

    With ``packs`` several floating tensors may travel between stages, in one. A ``tower`` is held by every stage.
    """

    def __init__(
        self,
        layers: Sequence[PipelineLayer],
        bounds: list[int],
        mesh: MeshSizes,
        packs: bool,
        tower: PipelineLayer | None,
        **options: object,
    ) -> None:
        self._bounds, self._packs = bounds, packs
        if tower is not None:  # last, so that it moves no bound of what is computed again
            layers = [layer for a, b in pairwise(bounds) for layer in (*layers[a:b], tower)]
            self._bounds = [bound + stage for stage, bound in enumerate(bounds)]
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipe, num_mp=mesh.tensor, num_dp=mesh.data * mesh.sequence)
        super().__init__([_layer_spec(layer) for layer in layers], topology=topology, **options)
        #: The tower that this stage has like all others.
        self.tower: HeldTower | None = None
        if tower is not None:
            self.tower = self.tied_modules[tower.tied]
            # DeepSpeed has this very list with the group that adds up gradients.
            self.tied_weight_attrs[tower.tied] += [name for name, _ in self.tower.named_parameters()]

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
        self._receives, self._sends = stage > 0, stage + 1 < self._topo.get_dim("pipe")

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One stage. The engine starts backward from what a stage sends, even where nothing in it is trained."""
        outputs = super().forward(unpacked(inputs) if self._packs and self._receives else inputs)
        if self._packs and self._sends:
            outputs = packed(outputs)
        if self._sends and torch.is_grad_enabled() and not outputs[0].requires_grad:
            outputs[0].requires_grad_()
        return outputs

    def get_tied_weights_and_groups(self) -> list:
        """Tied weights, whose ``grad`` the engine adds up, with their groups.

        Where gradients are summed in another type than their own (fp16; bf16 with an offloaded optimizer), the sum is
        not in ``grad`` but beside it: the engine would leave the two apart. Frozen weights have none.
        """
        tied = super().get_tied_weights_and_groups()
        sums = [getattr(weight, "grad_accum", None) for weight, _ in tied]
        return [
            (weight if total is None else SimpleNamespace(grad=total), group)
            for (weight, group), total in zip(tied, sums, strict=True)
            if weight.requires_grad
        ]


def _layer_spec(layer: PipelineLayer) -> LayerSpec:
    if layer.tied is None:
        return LayerSpec(layer.kind, *layer.arguments)
    names = [] if layer.kind is HeldTower else ["weight"]  # a tower's are known when it is built
    return TiedLayerSpec(layer.tied, layer.kind, *layer.arguments, forward_fn=layer.forward, tied_weight_attr=names)


def encode_before(engine: PipelineEngine, shared: SharedTower) -> None:
    """Have ``engine`` tell a ``shared`` tower what it needs to know of a step: which features a micro-batch takes, and
    that all their gradients are there.
    """
    given = engine._INSTRUCTION_MAP

    def load(self: PipelineEngine, buffer_id: int) -> None:
        given[schedule.LoadMicroBatch](self, buffer_id)
        if self.is_first_stage() and torch.is_grad_enabled():
            shared.watch(self.pipe_buffers["inputs"][buffer_id])

    def reduce_tied(self: PipelineEngine) -> None:
        shared.backward()
        given[schedule.ReduceTiedGrads](self)

    engine._INSTRUCTION_MAP = {**given, schedule.LoadMicroBatch: load, schedule.ReduceTiedGrads: reduce_tied}
