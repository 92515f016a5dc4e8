"""Which part of a parameter a tensor-parallel rank holds, from the plan that a model's config publishes.

Host arithmetic, a pure function of names and shapes. The plan (``config.base_model_tp_plan`` of transformers) says of a
module, or of a parameter, ``colwise``: cut along its outputs; ``rowwise``: along its inputs; ``packed_colwise``: along
its outputs, of which there are two kinds, one after the other; ``packed_rowwise``: where those are the last dimension.
What it does not name is held whole by every rank.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from fft.errors import UserError

#: What published plans leave out: a gated MLP beside the experts is cut like any other; what an activation function
#: learns (xIELU, in apertus) is learned on every rank from its part of the MLP.
_UNPUBLISHED = {
    "layers.*.mlp.act_fn": "replicated_with_grad_allreduce",
    "layers.*.mlp.shared_expert.gate_proj": "colwise",
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
}
_ATTENTION = {
    **dict.fromkeys((f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise"),
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLP = {
    **dict.fromkeys(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), "colwise"),
    "layers.*.mlp.down_proj": "rowwise",
}
#: A gate beside what it opens, in one matrix: each rank has the same columns of both.
_FUSED_MLP = {"layers.*.mlp.gate_up_proj": "packed_colwise", "layers.*.mlp.down_proj": "rowwise"}
#: Norms of each head's queries and keys, of which every rank has some.
_HEAD_NORMS = dict.fromkeys(
    ("layers.*.self_attn.query_layernorm", "layers.*.self_attn.key_layernorm"), "replicated_with_grad_allreduce"
)
#: What of some model types no plan is published for, or one that holds it whole.
_BY_TYPE = {
    # A norm of its own for every head.
    "cohere": dict.fromkeys(("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"), "colwise"),
    **{name: _FUSED_MLP for name in ("glm", "glm4", "phi3")},
    # Gate and up take turns along the last dimension of experts, whose inputs are the one before.
    "gpt_oss": {
        **_ATTENTION,
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.gate_up_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts.down_proj_bias": "rowwise",
    },
    "granitemoe": _ATTENTION,
    "granitemoeshared": {
        **_ATTENTION,
        "layers.*.shared_mlp.input_linear": "packed_colwise",
        "layers.*.shared_mlp.output_linear": "rowwise",
    },
    "hunyuan_v1_dense": {**_ATTENTION, **_HEAD_NORMS, **_MLP},
    "hunyuan_v1_moe": {**_ATTENTION, **_HEAD_NORMS},
}
#: Modules that are cut by rows of the vocabulary, whatever a plan says.
_VOCABULARY = ("embed_tokens", "embed_in", "lm_head", "embed_out")
#: Decoders for which no plan is published, or one without norms of heads, and those whose plan is theirs.
_SAME_AS = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")
#: torch's grouped products of experts take rows of whole 16 bytes: 8 values of bf16.
_ALIGNED = 8
#: What configs call the number of a layer's experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Of a linear layer's low-rank adapter (fft/models/lora.py) the matrix that is whole, by the layer's style.
_WHOLE = {"colwise": "lora_A", "packed_colwise": "lora_A", "rowwise": "lora_B"}
#: Lengths of the rows of an adapted matrix (fft/models/lora.py).
LENGTHS = "lora_magnitude_vector"
#: What a linear layer has one of for each output. Where its inputs are cut, all ranks have it whole.
_OF_OUTPUTS = ("bias", LENGTHS)


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a parameter of ``shape``: ``spans`` of dimension ``dim``, one after the other.

    ``copies`` neighbouring ranks hold the same; this is the ``copy``-th of them. With ``experts`` the part is of these
    entries of dimension 0, as an expert-parallel rank has them, and ``dim`` is another dimension.
    """

    shape: tuple[int, ...]
    dim: int
    spans: tuple[tuple[int, int], ...]
    copies: int = 1
    copy: int = 0
    experts: tuple[int, int] | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        held = sum(b - a for a, b in self.spans)
        shape = self._among
        return (*shape[: self.dim], held, *shape[self.dim + 1 :])

    @property
    def _among(self) -> tuple[int, ...]:
        """Shape of what ``spans`` cut: the parameter, or some of its experts."""
        if self.experts is None:
            return self.shape
        first, stop = self.experts
        return (stop - first, *self.shape[1:])

    def _own(self, whole: Tensor) -> Tensor:
        """What ``spans`` cut of the whole parameter; a view."""
        return whole if self.experts is None else whole[slice(*self.experts)]

    @property
    def _before(self) -> int:
        """Elements of the flattened parameter that stand before what ``spans`` cut."""
        return 0 if self.experts is None else self.experts[0] * prod(self.shape[1:])

    def swapped(self) -> "Shard":
        """The same part where the last two dimensions are the other way around."""
        dims = swap(tuple(range(len(self.shape))))
        return replace(self, shape=swap(self.shape), dim=dims[self.dim])

    def of(self, whole: Tensor) -> Tensor:
        """The part, of the whole parameter."""
        whole = self._own(whole)
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.spans], dim=self.dim)

    def put(self, whole: Tensor, local: Tensor) -> None:
        """Write the part into the whole parameter."""
        whole = self._own(whole)
        lengths = [b - a for a, b in self.spans]
        for (a, b), stretch in zip(self.spans, local.split(lengths, dim=self.dim), strict=True):
            whole.narrow(self.dim, a, b - a).copy_(stretch)

    def flat(self, index: Tensor) -> Tensor:
        """Where elements of the flattened part are in the flattened parameter, int64."""
        inner = prod(self.shape[self.dim + 1 :])
        held = torch.cat([torch.arange(a, b) for a, b in self.spans])
        row, column = index // inner, index % inner
        return (row // len(held) * self.shape[self.dim] + held[row % len(held)]) * inner + column + self._before

    def locate(self, index: Tensor) -> Tensor:
        """Where elements of the flattened parameter are in the flattened part, -1 for what is not in it."""
        inner, length = prod(self.shape[self.dim + 1 :]), self.shape[self.dim]
        held = torch.cat([torch.arange(a, b) for a, b in self.spans])
        positions = torch.full((length,), -1).scatter_(0, held, torch.arange(len(held)))
        index = index - self._before
        row, column = index // inner, index % inner
        position = positions[row % length]
        here = (position >= 0) & (index >= 0) & (index < prod(self._among))
        return torch.where(here, (row // length * len(held) + position) * inner + column, -1)

    @property
    def flat_start(self) -> int | None:
        """Where the part begins in the flattened parameter, if it is one stretch of it."""
        inner = prod(self.shape[self.dim + 1 :])
        if len(self.spans) == 1 and prod(self._among[: self.dim]) == 1:
            return self._before + self.spans[0][0] * inner
        if self.spans == ((0, self.shape[self.dim]),):
            return self._before
        return None


def swap(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with its last two dimensions the other way around."""
    *before, rows, columns = shape
    return *before, columns, rows


def heads_of(config: PretrainedConfig) -> tuple[int, int]:
    """A model's attention heads, and those of its keys and values, of which a config may not speak."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention makes keys and values for every head
        return heads, heads
    return heads, getattr(config, "num_key_value_heads", heads)


def published_plan(config: PretrainedConfig) -> dict[str, str]:
    """What transformers publishes for a decoder, or for one whose modules are the same, and what is known here besides;
    empty for others."""
    kind = _SAME_AS.get(config.model_type)
    published = (CONFIG_MAPPING[kind] if kind else config).base_model_tp_plan or {}
    return {**published, **_BY_TYPE.get(config.model_type, {})}


def plan_of(config: PretrainedConfig) -> dict[str, str]:
    """Style by module or parameter name, relative to the decoder, layer numbers as ``*``."""
    config = config.get_text_config()
    plan = {**_UNPUBLISHED, **published_plan(config)}
    if plan.get("layers.*.self_attn.kv_b_proj") == "colwise":  # what it gets is made on every rank, for its heads
        names = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
        plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in names}
    return plan


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """What the plan says of a module or parameter, given by its name relative to the decoder (``layers.3.mlp...``)."""
    name = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    layer, _, matrix = name.rpartition(".")
    if name not in plan and matrix == _WHOLE.get(plan.get(layer, "")):
        return "replicated_with_grad_allreduce"
    return plan.get(name)


def shard_of(
    name: str, shape: tuple[int, ...], plan: Mapping[str, str], heads: tuple[int, int], rank: int, size: int
) -> Shard | None:
    """The part of a parameter that ``rank`` of ``size`` holds, None for all of it.

    ``name`` is relative to the decoder, ``heads`` are the model's attention and key/value heads.
    """
    if size == 1:
        return None
    if name.rpartition(".")[0] in _VOCABULARY:
        return Shard(shape, 0, (_share(shape[0], rank, size),))
    module, _, kind = name.rpartition(".")
    if module.endswith((".lora_A", ".lora_B")) and style_of(module, plan) is None:
        module = module.rpartition(".")[0]  # it is cut as its layer is
    style = style_of(name, plan) or style_of(module, plan)
    outputs = max(0, len(shape) - 2)
    if style in ("packed_colwise", "packed_rowwise"):
        dim = outputs if style == "packed_colwise" else len(shape) - 1
        half = shape[dim] // 2
        a, b = _share(half, rank, size)
        return Shard(shape, dim, ((a, b), (half + a, half + b)))
    if style == "colwise":
        if module.endswith(_KEYS_AND_VALUES) and heads[1] < size:
            copies = size // heads[1]  # several ranks have the same head
            span = _share(shape[0], rank // copies, heads[1])
            return Shard(shape, 0, (span,), copies, rank % copies)
        return Shard(shape, outputs, (_share(shape[outputs], rank, size),))
    if style == "rowwise":
        if kind in _OF_OUTPUTS:  # a bias is added once to the sum over ranks
            return None
        return Shard(shape, len(shape) - 1, (_share(shape[-1], rank, size),))
    return None


def expert_shard(shape: tuple[int, ...], rank: int, size: int, within: Shard | None = None) -> Shard:
    """The part of experts' parameter of ``shape`` [experts, ..] that ``rank`` of ``size`` expert-parallel ranks holds.

    ``within`` is what a tensor-parallel rank holds of it, by a dimension other than the experts'.
    """
    whole = Shard(shape, len(shape) - 1, ((0, shape[-1]),))
    return replace(within or whole, experts=_share(shape[0], rank, size))


def check_tensor_parallel(config: PretrainedConfig, size: int) -> None:
    """Raise :class:`UserError` where ``--model_parallel_size`` cannot share out a model's heads."""
    if size == 1:
        return
    config = config.get_text_config()
    if not published_plan(config):
        raise UserError(
            f"--model_parallel_size {size}: model type {config.model_type!r} publishes no tensor-parallel plan; "
            "set it to 1 and raise --pipe_parallel_size instead."
        )
    heads, kv_heads = heads_of(config)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if size not in fitting:
        raise UserError(
            f"--model_parallel_size {size} cannot share out {heads} attention and {kv_heads} key/value heads: use "
            f"{', '.join(map(str, fitting))}."
        )
    keys = ("moe_intermediate_size", "intermediate_size") if any(getattr(config, c, None) for c in _COUNTS) else ()
    key = next((name for name in keys if getattr(config, name, None)), "")
    width = getattr(config, key, 0)
    if width % (_ALIGNED * size):
        raise UserError(
            f"--model_parallel_size {size} cannot share out experts of {key} {width}: it must be a multiple of "
            f"{_ALIGNED} for each rank."
        )


def check_expert_parallel(config: PretrainedConfig, size: int) -> None:
    """Raise :class:`UserError` where ``--expert_parallel_size`` cannot share out a model's experts."""
    if size == 1:
        return
    config = config.get_text_config()
    count = next((found for name in _COUNTS if (found := getattr(config, name, None))), 0)
    if not count:
        raise UserError(
            f"--expert_parallel_size {size}: model type {config.model_type!r} has no experts: leave it at 1."
        )
    if count % size:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(f"--expert_parallel_size {size} cannot share out {count} experts: use {fitting}.")


def _share(length: int, rank: int, size: int) -> tuple[int, int]:
    return length * rank // size, length * (rank + 1) // size
