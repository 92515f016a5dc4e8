"""The layers of a model as stages of DeepSpeed's pipeline."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
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

#: Micro-batches of an evaluation that are under way between two stages: at least, at most, and in bytes.
_LEAST, _MOST, _UNDER_WAY = 2, 16, 1 << 26


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

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:  # DeepSpeed's own copies with gradients, of which torch warns
        super()._synchronize_tied_weights()

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


class Exchanges:
    """What a stage sends and receives between two of its computations, begun together and waited for once.

    DeepSpeed waits for one message before it begins the next, though what goes to a neighbour and what comes from it
    share no wire. Within a tick of its schedules both sides have the same messages, so that neither waits for one that
    the other has not begun. Tensors arrive where they stay: nothing is copied out of a buffer.

    gloo sends nothing before the other side has said that it waits for it, which takes the way there and back. In an
    evaluation, where nothing comes back, several micro-batches are waited for ahead, so that they follow one another.
    """

    def __init__(self, engine: PipelineEngine) -> None:
        self._operations: list[dist.P2POp] = []
        own = {
            schedule.SendActivation: self._send_activations,
            schedule.RecvActivation: self._receive_activations,
            schedule.SendGrad: self._send_gradients,
            schedule.RecvGrad: self._receive_gradients,
        }
        self._own = tuple(own)
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **own}
        engine._exec_schedule = partial(self._run, weakref.ref(engine))

    def _run(self, alive: Callable[[], PipelineEngine], ticks: schedule.PipeSchedule) -> None:
        """In place of the engine's own: each instruction, and before one that computes, what was begun."""
        engine = alive()
        engine._reserve_pipe_buffers(ticks.num_pipe_buffers())
        engine.fwd_outputs = []
        if isinstance(ticks, schedule.InferenceSchedule) and not engine.dynamic_shape and dist.get_backend() == "gloo":
            self._forwards(engine, ticks.micro_batches)
            return
        for instructions in ticks:
            for instruction in instructions:
                if not isinstance(instruction, self._own):
                    self._finish()
                engine._INSTRUCTION_MAP[type(instruction)](engine, **instruction.kwargs)
            self._finish()

    def _forwards(self, engine: PipelineEngine, micro_batches: int) -> None:
        """Forward alone: what comes is waited for as late as possible, and what is sent is looked after later."""
        own, asked, sent = engine._INSTRUCTION_MAP, deque[_UnderWay](), deque[_UnderWay]()
        for left in range(micro_batches, 0, -1):
            if engine.is_first_stage() or engine.is_last_stage():
                own[schedule.LoadMicroBatch](engine, buffer_id=0)
            if not engine.is_first_stage():
                while len(asked) < min(left, _ahead(engine.pipe_recv_buf)):
                    self._receive_activations(engine, 0)
                    asked.append(self._begun(engine.pipe_buffers["inputs"][0]))
                engine.pipe_buffers["inputs"][0] = asked.popleft().wait()
            own[schedule.ForwardPass](engine, buffer_id=0)
            if not engine.is_last_stage():
                self._send_activations(engine, 0)
                sent.append(self._begun(outputs := engine.pipe_buffers["outputs"][0]))
                if len(sent) > _ahead(outputs):
                    sent.popleft().wait()
        for message in sent:
            message.wait()

    def _begun(self, tensors: tuple[Tensor, ...]) -> "_UnderWay":
        """What was to be begun, begun; ``tensors`` are its content."""
        requests = dist.batch_isend_irecv(self._operations)
        self._operations.clear()
        return _UnderWay(requests, tensors)

    def _finish(self) -> None:
        if self._operations:
            # Receives first: see :func:`fft.parallel.groups.trade`.
            ordered = sorted(self._operations, key=lambda operation: operation.op is not dist.irecv)
            for request in dist.batch_isend_irecv(ordered):
                request.wait()
            self._operations.clear()  # what was sent had to live until here

    def _begin(self, operation: Callable, tensors: Iterable[Tensor], engine: PipelineEngine, stage: int) -> None:
        peer = engine.grid.stage_to_global(stage_id=stage)
        self._operations += [dist.P2POp(operation, tensor, peer) for tensor in tensors]

    def _send_activations(self, engine: PipelineEngine, buffer_id: int) -> None:
        outputs = engine.pipe_buffers["outputs"][buffer_id]
        if engine.dynamic_shape or engine.first_output_send:
            engine.first_output_send = False
            engine._send_tensor_meta(outputs, engine.next_stage)
        self._begin(dist.isend, (x.detach() for x in outputs), engine, engine.next_stage)

    def _receive_activations(self, engine: PipelineEngine, buffer_id: int) -> None:
        if engine.dynamic_shape or engine.pipe_recv_buf is None:
            # Shapes and types are all that is asked of it from here on.
            engine.pipe_recv_buf = tuple(x.to("meta") for x in engine._recv_tensor_meta(engine.prev_stage))
        inputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=engine.device) for x in engine.pipe_recv_buf)
        self._begin(dist.irecv, inputs, engine, engine.prev_stage)
        for x in inputs:
            x.requires_grad = x.is_floating_point()
        engine.pipe_buffers["inputs"][buffer_id] = inputs

    def _send_gradients(self, engine: PipelineEngine, buffer_id: int) -> None:
        inputs = engine.pipe_buffers["inputs"][buffer_id]
        self._begin(dist.isend, [x.grad for x in inputs if x.is_floating_point()], engine, engine.prev_stage)
        engine.pipe_buffers["inputs"][buffer_id] = None

    def _receive_gradients(self, engine: PipelineEngine, buffer_id: int) -> None:
        outputs = engine.pipe_buffers["outputs"][buffer_id]
        engine.grad_layer = [x.new_empty(x.shape) for x in outputs if x.is_floating_point()]
        self._begin(dist.irecv, engine.grad_layer, engine, engine.next_stage)


class _UnderWay(NamedTuple):
    """A message that was begun: its requests, and its tensors, which live until it is there."""

    requests: list[dist.Work]
    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there."""
        for request in self.requests:
            request.wait()
        return self.tensors


def _ahead(message: Iterable[Tensor] | None) -> int:
    """How many of such messages may be under way; of one that is not known yet, itself."""
    if message is None:
        return 1
    size = sum(x.numel() * x.element_size() for x in message)
    return max(_LEAST, min(_MOST, _UNDER_WAY // max(1, size)))
