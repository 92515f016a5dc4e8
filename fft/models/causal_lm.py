"""Any Hugging Face decoder as a list of pipeline layers, built from transformers' own modules.

The model is laid out once on the meta device (shapes, no memory); each rank then materialises only the modules of its
stage and fills them parameter by parameter, from safetensors or from a seed. Between layers travel the hidden states
[1, tokens, hidden size], the only floating tensor, and the document boundaries, int32 [tokens + 1].
"""

from copy import copy
from dataclasses import dataclass, field

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from fft.checkpoint.adapter import AdapterReader
from fft.checkpoint.hf import WeightReader
from fft.errors import UserError
from fft.models.experts import LoadBalance, watch_router
from fft.models.lora import Lora, adapt, freeze, is_adapter, reset_adapter, seed_of
from fft.models.recompute import selective
from fft.ops.attention import register_with_transformers
from fft.ops.backends.choice import choose
from fft.ops.documents import Documents
from fft.ops.fused import FusedOps, fuse
from fft.ops.ring import SequenceParallel, ShardedDocuments
from fft.parallel.tensor import TensorParallel, parallelise
from fft.parallel.tensor_plan import Shard, plan_of, shard_of

Activations = tuple[Tensor, Tensor]

#: Modules that ``base_model_pp_plan`` must name for a model to be cut the way we cut it.
_PLAN = {"embed_tokens", "layers", "norm"}

#: Mixtures of experts whose routers and stored weights we know.
_EXPERTS = ("qwen2_moe", "qwen3_moe")


def check_supported(config: PretrainedConfig, seq_len: int) -> None:
    """Raise :class:`UserError` by name for models whose layers we would get wrong."""
    name = config.model_type
    if set(getattr(config, "base_model_pp_plan", None) or ()) != _PLAN:
        raise UserError(
            f"model type {name!r} publishes no pipeline plan of embed_tokens, layers and norm: "
            "use a Llama, Qwen2, Qwen3 or Mistral class model, or a Qwen mixture of experts."
        )
    if name not in _EXPERTS and (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)):
        raise UserError(
            f"model type {name!r} is a mixture of experts of another kind than {' and '.join(_EXPERTS)}, which this "
            "release does not train."
        )
    if config.num_hidden_layers < 1:
        raise UserError(
            f"num_hidden_layers is {config.num_hidden_layers} in the model's config.json: it must be 1 or more."
        )
    _check_scores(config)
    _check_rotary(config, seq_len)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_key_value_heads {config.num_key_value_heads} does not divide num_attention_heads "
            f"{config.num_attention_heads} in the model's config.json."
        )
    activation = getattr(config, "hidden_act", None)
    if activation not in ACT2FN:
        raise UserError(f"hidden_act {activation!r} in the model's config.json is none that transformers knows.")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in kinds if kinds else bool(window)
    if windowed and (window or 0) < seq_len:
        raise UserError(
            f"model type {name!r} attends within a sliding window of {window} tokens: use --seq_len {window} or less."
        )
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds or ()):
        raise UserError(
            f"model type {name!r} mixes layer types {sorted(set(kinds))}, which this release does not train."
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UserError("attention_dropout is not supported with packed documents: set it to 0 in config.json.")


def _check_scores(config: PretrainedConfig) -> None:
    """Raise :class:`UserError` for what a model does to scores, embeddings or logits, and we would leave out."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            raise UserError(
                f"model type {config.model_type!r} caps scores ({key} {getattr(config, key)} in its config.json), "
                "which this release does not: use another model."
            )
    for key in ("embedding_multiplier", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1):
            raise UserError(
                f"model type {config.model_type!r} scales outside its layers ({key} {getattr(config, key)} in its "
                "config.json), which this release does not: use another model."
            )


def _check_rotary(config: PretrainedConfig, seq_len: int) -> None:
    """Raise :class:`UserError` where a document's frequencies would depend on its neighbours' length."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type")
    if kind == "dynamic":
        limit = config.max_position_embeddings
    elif kind == "longrope":
        limit = rotary["original_max_position_embeddings"]
    else:
        return
    if seq_len > limit:
        raise UserError(
            f"model type {config.model_type!r} has rotary scaling of type {kind!r}, whose frequencies change with the "
            f"longest document beyond {limit} tokens: use --seq_len {limit} or less, or yarn, llama3 or linear scaling."
        )


@dataclass
class ModelSource:
    """Where the modules and weights of a model come from: its config, and a weight reader or a seed.

    ``attention`` names the attention kernel, see :func:`fft.ops.backends.choice.choose`; ``fused`` are other kernels.
    ``tensor`` is set, before layers are built, where every rank holds a part of a layer's parameters; ``parallel``,
    before the first forward, where it holds a share of a row's tokens. ``balance`` is there for mixtures of experts.
    With ``lora`` adapters alone are trained, from ``adapter`` or, without it, from the seed; ``frozen`` are patterns as
    :func:`fft.models.lora.freeze` takes them. ``selective`` is for :mod:`fft.models.recompute`.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    weights: WeightReader | None = None
    seed: int = 0
    attention: str = "auto"
    fused: FusedOps | None = None
    tensor: TensorParallel | None = None
    parallel: SequenceParallel | None = None
    lora: Lora | None = None
    adapter: AdapterReader | None = None
    frozen: str | None = None
    selective: bool = False
    balance: LoadBalance | None = field(init=False, default=None)
    skeleton: PreTrainedModel = field(init=False)
    #: Parts of parameters that this rank holds, by full name; what is not here it holds whole.
    shards: dict[str, Shard] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.config._attn_implementation = register_with_transformers()
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        self.skeleton.config._attn_implementation = register_with_transformers()
        if self.lora is not None:
            adapt(self.skeleton, f"{self.base}.layers", self.lora)
        if self.frozen:
            freeze(self.skeleton, self.frozen)
        self.plan = plan_of(self.config)
        routed = sum(name.endswith("mlp.gate") for name, _ in self.skeleton.named_modules())
        if routed:
            self.balance = LoadBalance(self.config, routed)
        if self.fused is not None:
            fuse(self.skeleton, self.fused)

    @property
    def base(self) -> str:
        """Name of the decoder inside the model, ``model`` for most."""
        return self.skeleton.base_model_prefix

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get_text_config().tie_word_embeddings)

    @property
    def head_shard(self) -> Shard | None:
        """This rank's part of the output head, of the last stage; None where it has all of it."""
        return self.shards.get(f"{self.base}.embed_tokens.weight" if self.tied else "lm_head.weight")

    def build(self, path: str, module: nn.Module | None = None) -> nn.Module:
        """Materialise the module at ``path`` (a dotted name within the model), this rank's part of it, on the CPU.

        ``module`` stands for the one at ``path`` where only some of its children are wanted.
        """
        module = module or self.skeleton.get_submodule(path)
        shards = {}
        if self.tensor is not None:
            shards = self.cut(module, path, self.tensor.rank, self.tensor.size)
            self.shards.update({f"{path}.{name}": shard for name, shard in shards.items()})
        module.to_empty(device="cpu")
        self._fill(module, path)
        if self.tensor is not None:
            parallelise(module, self._relative(path), self.plan, shards, self.tensor)
        return module

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self.base}.")

    def shard(self, name: str, shape: tuple[int, ...], rank: int, size: int) -> Shard | None:
        """The part of a parameter of ``shape`` that a tensor-parallel rank of ``size`` holds, None for all of it."""
        heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return shard_of(self._relative(name), shape, self.plan, heads, rank, size)

    def cut(self, module: nn.Module, path: str, rank: int, size: int) -> dict[str, Shard]:
        """Make the parameters below ``module``, on the meta device, as small as the parts of ``rank`` of ``size``.

        Returns the parts, by names within the module.
        """
        shards = {}
        for name, child in module.named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                within = f"{name}.{key}" if name else key
                shard = self.shard(f"{path}.{within}", tuple(parameter.shape), rank, size)
                if shard is not None:
                    shards[within] = shard
                    part = parameter.new_empty(shard.local_shape)
                    child._parameters[key] = nn.Parameter(part, parameter.requires_grad)
        return shards

    @torch.no_grad()
    def _fill(self, module: nn.Module, path: str) -> None:
        """Give every parameter below ``module`` its value, independent of how the model is cut."""
        for name, child in module.named_modules():
            full = f"{path}.{name}" if name else path
            own = dict(child.named_parameters(recurse=False))
            if not own:
                continue
            weights = self.adapter if is_adapter(full) else self.weights
            if weights is not None:
                for key, parameter in own.items():
                    part, shard = f"{full}.{key}", self.shards.get(f"{full}.{key}")
                    shape = tuple(parameter.shape) if shard is None else shard.shape
                    parameter.copy_(weights.read(part, shape, shard))
                continue
            whole = copy(child)
            whole._parameters = {
                key: self._whole(p, self.shards.get(f"{full}.{key}")) for key, p in child._parameters.items()
            }
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(full, self.seed))
                if is_adapter(full):
                    reset_adapter(full, whole)
                else:
                    self.skeleton._init_weights(whole)
            for key, parameter in own.items():
                if (shard := self.shards.get(f"{full}.{key}")) is not None:
                    parameter.copy_(shard.of(whole._parameters[key]))

    @staticmethod
    def _whole(parameter: nn.Parameter | None, shard: Shard | None) -> nn.Parameter | None:
        return parameter if shard is None else nn.Parameter(parameter.new_empty(shard.shape))

    def rotary(self, device: torch.device) -> nn.Module:
        """The model's rotary embedding; its buffers are computed, never stored."""
        return type(self.skeleton.base_model.rotary_emb)(config=self.config).to(device)


class Positions:
    """What every decoder layer of a stage needs to know of a micro-batch, computed by the first one that asks."""

    def __init__(self, source: ModelSource) -> None:
        self._source, self.attention = source, source.attention
        self._rotary: nn.Module | None = None
        self._seen: Tensor | None = None
        self._known: tuple = ()

    def of(
        self, cu_seqlens: Tensor, hidden: Tensor
    ) -> tuple[Documents | ShardedDocuments, Tensor, tuple[Tensor, Tensor]]:
        """Documents, in-document positions [1, tokens] and rotary (cos, sin) for the boundaries given."""
        if self._seen is not cu_seqlens:
            if self._rotary is None:
                self._rotary = self._source.rotary(hidden.device)
                # A kernel is compared with the reference when it is first chosen, which must not happen within a layer:
                # what runs there in forward, and is kept, has to run in a recomputation, too.
                choose(hidden.device, hidden.dtype, self.attention, self._source.head_size)
            documents, parallel = Documents.from_padded(cu_seqlens), self._source.parallel
            if parallel is not None:
                documents = ShardedDocuments(documents, parallel.layout(documents.bounds), parallel)
            positions = documents.positions()[None]
            self._known = documents, positions, self._rotary(hidden.detach(), position_ids=positions)
            self._seen = cu_seqlens
        return self._known


class Embedding(nn.Module):
    """Token ids, boundaries -> hidden states, boundaries."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.path = f"{source.base}.embed_tokens"
        self.module = source.build(self.path)
        self._ranks, self._rows = source.tensor, source.shards.get(f"{self.path}.weight")
        if self._rows is not None and self.module.padding_idx is not None:
            (start, stop), pad = self._rows.spans[0], self.module.padding_idx
            self.module.padding_idx = pad - start if start <= pad < stop else None

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden size], or this rank's rows of it."""
        return self.module.weight

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Activations:
        """``inputs`` are int32 [1, tokens] and the boundaries."""
        input_ids, cu_seqlens = inputs
        if self._rows is None:
            return self.module(input_ids), cu_seqlens
        ((start, stop),) = self._rows.spans
        elsewhere = (input_ids < start) | (input_ids >= stop)
        # Any row will do for what is elsewhere: it is masked, and so is its gradient.
        own = self.module(input_ids.sub(start).clamp(0, stop - start - 1))
        return self._ranks.leave(own.masked_fill(elsewhere[..., None], 0)), cu_seqlens


class DecoderLayer(nn.Module):
    """A transformers decoder layer, whole or one half of it (``half`` is None, "attention" or "mlp").

    A half is the same layer with the other half's modules replaced by ones that add nothing to the residual stream,
    so the architecture's own forward stays the only one.
    """

    def __init__(self, source: ModelSource, index: int, positions: Positions, half: str | None = None) -> None:
        super().__init__()
        self.path = f"{source.base}.layers.{index}"
        layer = decoder_half(source.skeleton.get_submodule(self.path), half)
        self.module = source.build(self.path, layer)
        self._positions, self._selective = positions, source.selective
        self._balance, self._routed = source.balance, watch_router(self.module)

    def forward(self, activations: Activations) -> Activations:
        """One decoder layer."""
        hidden, cu_seqlens = activations
        positions = self._positions.of(cu_seqlens, hidden)
        hidden = selective(self._layer, hidden, *positions) if self._selective else self._layer(hidden, *positions)
        return hidden, cu_seqlens

    def _layer(
        self,
        hidden: Tensor,
        documents: Documents | ShardedDocuments,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        hidden = self.module(
            hidden,
            attention_mask=None,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            documents=documents,
            attention=self._positions.attention,
        )
        if self._routed is None:
            return hidden
        return self._balance.attach(hidden, *self._routed(), documents.real)


class FinalNorm(nn.Module):
    """The norm before the head; boundaries end here."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.path = f"{source.base}.norm"
        self.module = source.build(self.path)

    def forward(self, activations: Activations) -> Activations:
        """Normalise the hidden states."""
        return self.module(activations[0]), activations[1]


class Head(nn.Module):
    """The output head. Returns (hidden states [tokens, hidden size], weight): logits are the loss's business."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.path = "lm_head"
        self.module = source.build(self.path)

    def forward(self, activations: Activations) -> tuple[Tensor, Tensor]:
        """See the class."""
        return activations[0][0], _view(self.module.weight)


def _tied_head(embedding: Embedding, activations: Activations) -> tuple[Tensor, Tensor]:
    return activations[0][0], _view(embedding.weight)


def _view(weight: Tensor) -> Tensor:
    # A parameter that is itself an output of the engine's forward gets no gradient from DeepSpeed's bf16 optimizer.
    return weight.view_as(weight)


def pipeline_layers(source: ModelSource, split_dlayer: bool = False) -> list[LayerSpec]:
    """The model as layer specifications: embedding, decoder layers (or halves), norm, head."""
    positions = Positions(source)
    halves = ("attention", "mlp") if split_dlayer else (None,)
    if source.tied:
        first = TiedLayerSpec("embedding", Embedding, source, tied_weight_attr="weight")
        last = TiedLayerSpec("embedding", Embedding, source, forward_fn=_tied_head, tied_weight_attr="weight")
    else:
        first, last = LayerSpec(Embedding, source), LayerSpec(Head, source)
    decoder = [
        LayerSpec(DecoderLayer, source, index, positions, half)
        for index in range(source.config.num_hidden_layers)
        for half in halves
    ]
    return [first, *decoder, LayerSpec(FinalNorm, source), last]


def decoder_half(layer: nn.Module, half: str | None) -> nn.Module:
    """A decoder layer, whole (None) or its "attention" or "mlp" half; see :class:`DecoderLayer`."""
    if half == "attention":
        return _without(layer, mlp=_AddsNothing(), post_attention_layernorm=nn.Identity())
    if half == "mlp":
        return _without(layer, self_attn=_AttendsToNothing(), input_layernorm=nn.Identity())
    return layer


def canonical_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the pipeline layers inside ``module`` under their Hugging Face names."""
    named = {}
    for layer in module.modules():
        if isinstance(layer, (Embedding, DecoderLayer, FinalNorm, Head)):
            named.update({f"{layer.path}.{name}": p for name, p in layer.module.named_parameters()})
    return named


class _AddsNothing(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


class _AttendsToNothing(nn.Module):
    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


def _without(layer: nn.Module, **replacements: nn.Module) -> nn.Module:
    """A shallow copy of a decoder layer with some of its children replaced."""
    missing = [name for name in replacements if name not in layer._modules]
    if missing:
        raise UserError(
            f"--split_dlayer: {type(layer).__name__} has no {', '.join(missing)}; train it without the flag."
        )
    half = layer.__class__.__new__(layer.__class__)
    half.__dict__.update(layer.__dict__)
    half._modules = {**layer._modules, **replacements}
    return half
