"""What a pipeline layer keeps of a micro-batch for its backward, found out by running it on the meta device.

The layer's own forward and backward run, cut for a tensor- and a sequence-parallel rank, on tensors that have shapes
and no memory; every storage that is made is counted while it lives. What autograd keeps, and for how long, is
therefore not estimated, for any architecture; only the attention kernel is one that returns shapes
(:mod:`fft.ops.backends.meta`).
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fft.models.experts import balance_loss
from fft.models.layers import DecoderLayer, Embedding, FinalNorm
from fft.models.lora import dropping, hold_columns
from fft.models.recompute import kept_of, selective
from fft.models.spec import ModelSpec, copy_of, cut
from fft.ops.attention import packed_attention
from fft.ops.backends import Backend, meta
from fft.ops.documents import Documents, Softmax
from fft.ops.experts import spread_all
from fft.ops.sequence_parallel import PLAIN, SequenceParallel, ShardedDocuments
from fft.parallel.expert import ExpertParallel
from fft.parallel.mesh import MeshSizes
from fft.parallel.ring_plan import TokenShards, plan_shards
from fft.parallel.tensor import TensorParallel, parallelise
from fft.planning.costs import TOWER, PlannedLayer, planned_layers, tower_layers
from fft.planning.tower_activations import SeenRow, turns_of

ONE_RANK = MeshSizes(1, 1)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one micro-batch in one layer.

    ``saved`` from forward to backward, the layer's input included where the backward needs it; ``forward`` and
    ``backward`` are what the pass needs besides for a moment, at most.
    """

    saved: int
    forward: int
    backward: int


def layer_activations(
    spec: ModelSpec,
    tokens: int,
    split_dlayer: bool = False,
    mesh: MeshSizes = ONE_RANK,
    images: SeenRow | None = None,
) -> list[LayerActivations]:
    """Activations of each pipeline layer but the head, for micro-batches of ``tokens`` over the ranks of ``mesh``.

    The row is taken as one document, for which a ring exchanges most; ``images`` are those of a model that sees some.
    Of experts that are spread over ranks each is taken to be sent as many tokens as any other. Layers of one shape are
    run once.
    """
    return _of_layers(spec, planned_layers(spec, split_dlayer)[:-1], tokens, mesh, images)


def tower_activations(spec: ModelSpec, images: SeenRow) -> list[LayerActivations]:
    """Of the layers of a tower, wherever it is, that encodes the images of a row."""
    return _of_layers(spec, tower_layers(spec), 1, ONE_RANK, images)


def _of_layers(
    spec: ModelSpec, layers: Sequence[PlannedLayer], tokens: int, mesh: MeshSizes, images: SeenRow | None
) -> list[LayerActivations]:
    known: dict[tuple, LayerActivations] = {}
    found = []
    for number, layer in enumerate(layers):
        parts = ((name, p.requires_grad, *p.shape) for m in layer.modules.values() for name, p in m.named_parameters())
        taps = images is not None and images.taps_at(number)
        shape = layer.kind, taps, _kind(spec, layer), *parts
        if shape not in known:
            known[shape] = _run(spec, layer, tokens, mesh, images, taps)
        found.append(known[shape])
    return found


def _kind(spec: ModelSpec, layer: PlannedLayer) -> str | None:
    """The type of a decoder layer, where a model has several."""
    kinds = getattr(spec.text, "layer_types", None)
    return kinds[int(layer.path.rpartition(".")[2])] if kinds and layer.kind is DecoderLayer else None


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: those that live, and the most that lived at once."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        # By address while they live: PyTorch keeps one Python object for a storage as long as someone watches it.
        self._seen = weakref.WeakSet()
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._seen.update(self._existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.now -= size


def _run(
    spec: ModelSpec, layer: PlannedLayer, tokens: int, mesh: MeshSizes, images: SeenRow | None, taps: bool
) -> LayerActivations:
    if layer.kind in TOWER and images is not None:
        copies = {path: copy_of(module) for path, module in layer.modules.items()}
        parameters = [p for module in copies.values() for p in module.parameters()]
        return passes_of(images.through(layer.kind, copies), images.existing, parameters, spec.dtype)
    module, dtype, path = copy_of(layer.modules[layer.path]), spec.dtype, layer.path
    routing = spec.routing
    logits = None if routing is None else routing.watch(module)
    if any(parameter.ndim == 3 for parameter in module.parameters()):
        # On the meta device torch's grouped product of experts knows bf16 alone: the bytes of fp32 are twice as many.
        dtype = torch.bfloat16
        module.to(dtype)
    shards = cut(module, path, spec.shards(0, mesh.tensor, (0, mesh.expert)))
    if mesh.tensor > 1:
        parallelise(module, spec.within(path), spec.plan, shards, ranks := _SilentTensor(mesh.tensor))
        hold_columns(module, shards, ranks)
    if mesh.expert > 1:
        spread_all(module, _SilentExperts(mesh.expert))
    own = tokens // mesh.sequence
    with torch.device("meta"):
        hidden = torch.empty(1, own, spec.text.hidden_size, dtype=dtype, requires_grad=True)
        ids = torch.empty(1, own, dtype=torch.int32)
        positions = torch.empty(1, own, dtype=torch.int64)
        documents = _documents(tokens, mesh.sequence)
        draws = torch.empty(own, dtype=torch.int32)
    for adapter in dropping(module):
        adapter.draws = draws
    turns = turns_of(spec, path, own, dtype)

    def call() -> tuple[Tensor | None, ...]:
        if layer.kind is Embedding:
            embedded = module(ids)
            return (embedded if images is None else images.placed(embedded),)
        if layer.kind is FinalNorm:
            return (module(hidden.clone()),)
        loss = None if logits is None or routing is None else lambda: balance_loss(logits(), routing.chosen, own)
        options = {"position_ids": positions, "position_embeddings": turns, "documents": documents}
        run = partial(_layer, module, loss, **options, alibi=spec.slopes(0, mesh.tensor))
        again = partial(selective, run, kept=kept_of(module)) if spec.selective else run
        output, balance = again(hidden.clone())
        return (images.tapped(output) if taps and images is not None else output), balance

    existing = [hidden, ids, draws, *tree_leaves(turns), positions, *(images.existing if images is not None else ())]
    return passes_of(call, existing, list(module.parameters()), spec.dtype, spec.dtype.itemsize // dtype.itemsize)


def passes_of(
    call: Callable[[], Sequence[Tensor | None]],
    existing: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    dtype: torch.dtype,
    scale: int = 1,
) -> LayerActivations:
    """What the forward that ``call`` makes, and the backward from its outputs, hold; ``scale`` times the bytes.

    ``existing`` are tensors that are there anyhow, as the ``parameters`` of a model of ``dtype`` are.
    """
    existing = [*existing, *parameters]
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if dtype == torch.float32:
            parameter.grad = torch.empty_like(parameter)  # of the micro-batch before: this one's are added
            existing.append(parameter.grad)
        else:
            parameter.register_post_accumulate_grad_hook(add_to_sum)
    with Alive(existing) as alive:
        outputs = call()
        end = _End.apply(*outputs)
        forward = alive.most
        del outputs
        saved = alive.most = alive.now
        extra = end.nbytes
        if end.requires_grad:  # not of a frozen embedding
            end.backward()
    return LayerActivations(scale * (saved - extra), scale * (forward - saved), scale * (alive.most - saved))


def add_to_sum(parameter: nn.Parameter) -> None:
    """What DeepSpeed does with a gradient in bf16: it is added to a sum in fp32, which exists, and forgotten."""
    if parameter.grad is not None:
        parameter.grad.to(torch.float32)
    parameter.grad = None


def _layer(
    module: nn.Module, loss: Callable[[], Tensor] | None, hidden: Tensor, **options: object
) -> tuple[Tensor, Tensor | None]:
    """A decoder layer's output, and the balance loss of its experts, if it has some."""
    output = module(hidden, attention_mask=None, **options)
    return output, None if loss is None else loss()


class _End(torch.autograd.Function):
    """What comes after: it keeps nothing and sends gradients back."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor | None) -> Tensor:
        ctx.like = [output if output is None else (output.shape, output.dtype) for output in outputs]
        return next(output for output in outputs if output is not None).new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return tuple(like if like is None else grad.new_empty(like[0], dtype=like[1]) for like in ctx.like)


def _documents(tokens: int, sequence: int) -> ShardedDocuments:
    row = Documents.of((0, tokens), "meta")
    if sequence == 1:
        return ShardedDocuments(row, plan_shards(row.bounds, 1), _Alone(row))
    return ShardedDocuments(row, plan_shards(row.bounds, sequence), _SilentSequence(sequence))


class _Alone(SequenceParallel):
    """The only rank of a row, whose attention needs no ring."""

    def __init__(self, row: Documents) -> None:
        self._row = row

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: TokenShards,
        scale: float,
        backend: Backend | None = None,
        softmax: Softmax = PLAIN,
    ) -> Tensor:
        return packed_attention(q, k, v, self._row, scale, meta, softmax)


class _SilentTensor(TensorParallel):
    """The first of tensor-parallel ranks, whom nobody answers."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.group, self.copies = size, 0, None, None

    def all_reduce(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return x


class _SilentExperts(ExpertParallel):
    """The first of expert-parallel ranks, to whom all send as much as it sends to each."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.group = size, 0, None

    def counts(self, sends: Tensor, rows: int) -> tuple[Tensor, list[int], list[int]]:
        shares = [rows * (rank + 1) // self.size - rows * rank // self.size for rank in range(self.size)]
        return sends.view(self.size, -1), shares, shares


class _SilentExchange:
    rank = 0

    def start(self, sends: list, receives: list) -> Any:
        return lambda: None


class _SilentSequence(SequenceParallel):
    """The first rank of a ring, whom nobody answers."""

    def __init__(self, size: int) -> None:
        self.degree, self.rings, self.position, self._exchange = 1, size, 0, _SilentExchange()

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: TokenShards,
        scale: float,
        backend: Backend | None = None,
        softmax: Softmax = PLAIN,
    ) -> Tensor:
        return super().attention(q, k, v, shards, scale, meta, softmax)
