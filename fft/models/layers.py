"""A decoder as a list of pipeline layers: embedding, decoder layers or their halves, norm, head.

Between layers travel the hidden states [1, tokens, hidden size], the only floating tensor, and the document boundaries,
int32 [tokens + 1]. A model that sees images has the layers of its tower before these, and more to carry: see
:mod:`fft.models.carried`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from fft.errors import UserError
from fft.models.baichuan import NormalizedHead
from fft.models.carried import Carried, ModelLayer
from fft.models.causal_lm import Known, StageBuilder
from fft.models.compiled import compiled
from fft.models.lora import dropping
from fft.models.recompute import kept_of, selective
from fft.models.rotary import Rotary, Turns
from fft.models.towers import trained_tower
from fft.models.vision_layers import HeldTower, Merger, Patches, TowerPlan, VisionBlock
from fft.ops.backends.choice import choose
from fft.ops.documents import Boundaries, Documents
from fft.ops.sequence_parallel import ShardedDocuments

Activations = tuple[Tensor, ...]


@dataclass(frozen=True)
class PipelineLayer:
    """A layer that the rank of its stage will build: a class and what it is called with.

    Layers ``tied`` by the same name share a ``weight``. A rank that has two of them builds one; ``forward``, given that
    module and the activations, stands for the other's.
    """

    kind: type[nn.Module]
    arguments: tuple
    tied: str | None = None
    forward: Callable[..., Activations] | None = None

    def build(self) -> nn.Module:
        """Materialise it on the CPU."""
        return self.kind(*self.arguments)


class Positions:
    """What every decoder layer of a stage needs to know of a micro-batch, computed by the first one that asks."""

    def __init__(self, builder: StageBuilder) -> None:
        self._builder, self.attention = builder, builder.spec.attention
        ranks = builder.ranks.tensor
        self.slopes = builder.spec.slopes() if ranks is None else builder.spec.slopes(ranks.rank, ranks.size)
        self._rotary: Rotary | None = None

    def of(self, row: Carried, layer: int) -> tuple[Documents | ShardedDocuments, Tensor, Turns | None]:
        """Documents, in-document positions [1, tokens] and a layer's rotary (cos, sin) for the boundaries of a row."""
        hidden = row.states
        if self._rotary is None:
            self._rotary = Rotary(self._builder.spec.skeleton, hidden.device)
            # A kernel is compared with the reference when it is first chosen, which must not happen within a layer:
            # what runs there in forward, and is kept, has to run in a recomputation, too.
            spec = self._builder.spec
            choose(hidden.device, hidden.dtype, self.attention, spec.attended_size, spec.caps_scores)
        documents, positions, turns = self._builder.under_way.of(row.cu_seqlens, self._known)
        kind = self._rotary.kind(layer)
        if kind not in turns:
            own = positions if row.positions is None or not self._rotary.axes else row.positions[:, None]
            turns[kind] = self._rotary.turns(hidden.detach(), own, kind)
        return documents, positions, turns[kind]

    def _known(self, cu_seqlens: Tensor, host: list[int] | None) -> Known:
        documents, ranks = Documents.from_padded(cu_seqlens, host), self._builder.ranks.sequence
        if ranks is None:
            return documents, documents.positions()[None], {}
        sharded = ShardedDocuments(documents, ranks.shards(documents.bounds), ranks)
        return sharded, sharded.positions()[None], {}


class Embedding(ModelLayer):
    """Token ids, boundaries -> hidden states, boundaries. Tokens of images become the features of the tower."""

    def __init__(self, builder: StageBuilder) -> None:
        super().__init__()
        self.path = builder.spec.embedding
        self.module = cast(nn.Embedding, builder.build(self.path))
        self.named = {self.path: self.module}
        self._scale = builder.spec.outside.embedding
        self._ranks, self._rows = builder.ranks.tensor, builder.shards.get(f"{self.path}.weight")
        if self._rows is not None and self.module.padding_idx is not None:
            (start, stop), pad = self._rows.spans[0], self.module.padding_idx
            self.module.padding_idx = pad - start if start <= pad < stop else None

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden size], or this rank's rows of it."""
        return self.module.weight

    def forward(self, inputs: Activations) -> Activations:
        """``inputs`` are int32 [1, tokens] and the boundaries, after the features where there are some."""
        row = Carried.of(inputs)
        if row.input_ids is None:
            raise ValueError("an embedding takes ids")
        hidden = self._embed(row.input_ids)
        if row.hidden is not None:
            places, features = row.at_images()
            hidden = hidden.index_copy(1, places, row.hidden[features][None])
        return row.embedded(hidden).tensors()

    def _embed(self, input_ids: Tensor) -> Tensor:
        if self._ranks is None or self._rows is None:
            return self._scaled(self.module(input_ids))
        ((start, stop),) = self._rows.spans
        elsewhere = (input_ids < start) | (input_ids >= stop)
        # Any row will do for what is elsewhere: it is masked, and so is its gradient.
        own = self.module(input_ids.sub(start).clamp(0, stop - start - 1))
        return self._scaled(self._ranks.leave(own.masked_fill(elsewhere[..., None], 0)))

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self._scale == 1 else hidden * self._scale


class DecoderLayer(ModelLayer):
    """A transformers decoder layer, whole or one half of it (``half`` is None, "attention" or "mlp").

    A half is the same layer with the other half's modules replaced by ones that add nothing to the residual stream,
    so the architecture's own forward stays the only one.
    """

    def __init__(self, builder: StageBuilder, index: int, positions: Positions, half: str | None = None) -> None:
        super().__init__()
        self.path = f"{builder.spec.base}.layers.{index}"
        layer = decoder_half(builder.spec.skeleton.get_submodule(self.path), half)
        self.module = builder.build(self.path, layer)
        self.named, self._ends = {self.path: self.module}, half != "attention"
        self._index, self._positions = index, positions
        self._balance, routing = builder.balance, builder.spec.routing
        self._logits = None if routing is None else routing.watch(self.module)
        self._compiles = builder.spec.compiler is not None
        self._dropping = dropping(self.module)
        # Logits that are noted on the side are no part of what a graph recomputes: then its compiler decides what is.
        told = builder.spec.selective and not (self._compiles and self._logits)
        self._kept = kept_of(self.module) if told else None
        self._computed = compiled(self._layer, builder.spec.compiler)

    def forward(self, activations: Activations) -> Activations:
        """One decoder layer. Raises ValueError where it is to drop something and the tokens have no random numbers."""
        row, draws = Carried.of(activations), None
        if self._dropping and self.training:
            if row.draws is None:
                raise ValueError("adapters drop some of their input by the numbers of tokens, which are missing")
            draws = row.draws.int()
        documents, *positions = self._positions.of(row, self._index)
        seen = documents.boundaries if self._compiles else documents
        hidden, logits = self._computed(row.states, seen, draws, *positions)
        if logits is not None and self._balance is not None:
            hidden = self._balance.attach(hidden, logits, documents.real)
        return (row.tapped(hidden) if self._ends else replace(row, hidden=hidden)).tensors()

    def _layer(self, hidden: Tensor, *given: Any) -> tuple[Tensor, Tensor | None]:
        """What :meth:`_once` gives, whichever activations are computed again."""
        if self._kept is None:
            return self._once(hidden, *given)
        return selective(self._once, hidden, *given, kept=self._kept)

    def _once(
        self,
        hidden: Tensor,
        documents: Documents | ShardedDocuments | Boundaries,
        draws: Tensor | None,
        position_ids: Tensor,
        position_embeddings: Turns | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and, of a layer whose experts are kept in balance, the router's logits."""
        for adapter in self._dropping:
            adapter.draws = draws
        hidden = self.module(
            hidden,
            attention_mask=None,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            documents=documents,
            attention=self._positions.attention,
            alibi=self._positions.slopes,
        )
        return hidden, None if self._logits is None else self._logits()


class FinalNorm(ModelLayer):
    """The norm before the head; boundaries end here."""

    def __init__(self, builder: StageBuilder) -> None:
        super().__init__()
        self.path = builder.spec.norm
        self.module = builder.build(self.path)
        self.named = {self.path: self.module}
        self._scale = builder.spec.outside.logits

    def forward(self, activations: Activations) -> Activations:
        """Normalise the hidden states. A factor of the logits is one of theirs."""
        row = Carried.of(activations)
        hidden = self.module(row.states)
        return hidden if self._scale == 1 else hidden * self._scale, row.cu_seqlens


class Head(ModelLayer):
    """The output head. Returns (hidden states [tokens, hidden size], weight, and its bias, if it has one): logits are
    the loss's business.
    """

    def __init__(self, builder: StageBuilder) -> None:
        super().__init__()
        self.path = builder.spec.output
        self.module = cast(nn.Linear, builder.build(self.path))
        self.named = {self.path: self.module}

    def forward(self, activations: Activations) -> tuple[Tensor, ...]:
        """See the class."""
        if isinstance(self.module, NormalizedHead):
            return activations[0].squeeze(0), self.module.rows()
        bias = self.module.bias
        return activations[0].squeeze(0), _view(self.module.weight), *([] if bias is None else [_view(bias)])


def _tied_head(embedding: Embedding, activations: Activations) -> tuple[Tensor, Tensor]:
    return activations[0].squeeze(0), _view(embedding.weight)


def _view(weight: Tensor) -> Tensor:
    # A parameter that is itself an output of the engine's forward gets no gradient from DeepSpeed's bf16 optimizer.
    return weight.view_as(weight)


def pipeline_layers(builder: StageBuilder, split_dlayer: bool = False) -> list[PipelineLayer]:
    """The model as layers that are yet to be built: embedding, decoder layers (or halves), norm, head.

    Before them, where images are seen, those of the tower, unless all stages have it: patches, blocks, and what merges
    them.
    """
    spec, positions = builder.spec, Positions(builder)
    halves = ("attention", "mlp") if split_dlayer else (None,)
    if spec.tied:
        first = PipelineLayer(Embedding, (builder,), "embedding")
        last = PipelineLayer(Embedding, (builder,), "embedding", _tied_head)
    else:
        first, last = PipelineLayer(Embedding, (builder,)), PipelineLayer(Head, (builder,))
    decoder = [
        PipelineLayer(DecoderLayer, (builder, index, positions, half))
        for index in range(spec.text.num_hidden_layers)
        for half in halves
    ]
    return [*_tower_layers(builder), first, *decoder, PipelineLayer(FinalNorm, (builder,)), last]


def held_tower(builder: StageBuilder) -> PipelineLayer | None:
    """The layer that is all of a tower that every stage has; None where stages have its layers, or there is none."""
    if (tower := trained_tower(builder.spec)) is None or not builder.spec.shared_tower:
        return None
    return PipelineLayer(HeldTower, (TowerPlan(builder, tower),), "tower", _pass_by)


def _pass_by(tower: HeldTower, activations: Activations) -> Activations:
    return activations


def _tower_layers(builder: StageBuilder) -> list[PipelineLayer]:
    if (tower := trained_tower(builder.spec)) is None or builder.spec.shared_tower:
        return []
    plan = TowerPlan(builder, tower)
    blocks = [PipelineLayer(VisionBlock, (plan, index)) for index in range(tower.depth)]
    return [PipelineLayer(Patches, (plan,)), *blocks, PipelineLayer(Merger, (plan,))]


#: What a layer is made of that can be halved: attention and the norm before it, the MLP and the norm before it.
_HALVES = ("self_attn", "input_layernorm", "mlp", "post_attention_layernorm")
#: MLPs that give their layer more than hidden states.
_GIVES_MORE = ("GptOssMLP",)


def decoder_half(layer: nn.Module, half: str | None) -> nn.Module:
    """A decoder layer, whole (None) or its "attention" or "mlp" half; see :class:`DecoderLayer`.

    Raises :class:`UserError` for one that has other modules than those, which both halves would train, and for one
    whose MLP gives more than hidden states.
    """
    if half is None:
        return layer
    missing = [name for name in _HALVES if name not in layer._modules]
    children = ((name, child) for name, child in layer.named_children() if name not in _HALVES)
    both = [name for name, child in children if next(child.parameters(), None) is not None]
    if missing or both:
        what = f"no {', '.join(missing)}" if missing else f"{', '.join(both)} besides {', '.join(_HALVES)}"
        raise UserError(f"--split_dlayer: {type(layer).__name__} has {what}; train it without the flag.")
    if (mlp := type(layer.get_submodule("mlp")).__name__) in _GIVES_MORE:
        raise UserError(f"--split_dlayer: what {mlp} gives is no hidden states alone; train it without the flag.")
    if half == "attention":
        return _without(layer, mlp=_AddsNothing(), post_attention_layernorm=nn.Identity())
    return _without(layer, self_attn=_AttendsToNothing(), input_layernorm=nn.Identity())


def canonical_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the pipeline layers inside ``module`` under their Hugging Face names."""
    named = {}
    for layer in module.modules():
        for path, own in layer.named.items() if isinstance(layer, ModelLayer) else ():
            named.update({f"{path}.{name}": p for name, p in own.named_parameters()})
    return named


def canonical_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of the pipeline layers inside ``module`` that are stored with the model, under their names there."""
    named = {}
    for layer in module.modules():
        for path, own in layer.named.items() if isinstance(layer, ModelLayer) else ():
            stored, parameters = own.state_dict(), dict(own.named_parameters())
            named.update({f"{path}.{name}": b for name, b in stored.items() if name not in parameters})
    return named


class _AddsNothing(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


class _AttendsToNothing(nn.Module):
    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


def _without(layer: nn.Module, **replacements: nn.Module) -> nn.Module:
    """A shallow copy of a decoder layer with some of its children replaced."""
    half = layer.__class__.__new__(layer.__class__)
    half.__dict__.update(layer.__dict__)
    half._modules = {**layer._modules, **replacements}
    return half
