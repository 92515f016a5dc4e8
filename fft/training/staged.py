"""The layers of a model as stages of DeepSpeed's pipeline."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from fft.models.carried import packed, unpacked
from fft.models.layers import PipelineLayer
from fft.parallel.mesh import MeshSizes


class StagedModel(PipelineModule):
    """A :class:`PipelineModule` whose stage bounds are given, so that no rank builds layers it does not keep.

    With ``packs`` several floating tensors may travel between stages, in one.
    """

    def __init__(
        self, layers: Sequence[PipelineLayer], bounds: list[int], mesh: MeshSizes, packs: bool, **options: object
    ) -> None:
        self._bounds, self._packs = bounds, packs
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipe, num_mp=mesh.tensor, num_dp=mesh.data * mesh.sequence)
        super().__init__([_layer_spec(layer) for layer in layers], topology=topology, **options)

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
    return TiedLayerSpec(layer.tied, layer.kind, *layer.arguments, forward_fn=layer.forward, tied_weight_attr="weight")
