"""What every pipeline layer costs, read off the model laid out on the meta device: arithmetic and parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from fft.models.layers import decoder_half
from fft.models.spec import ModelSpec
from fft.parallel.tensor_plan import Shard


@dataclass(frozen=True)
class LayerCost:
    """One pipeline layer. ``flops`` are multiply-adds per token, in forward.

    ``parameters`` are the whole model's, each counted once: a head that is the embedding has none. ``held`` is what one
    tensor-parallel rank of the layer's stage keeps, ``matrices`` of it with two dimensions or more.
    """

    flops: float
    parameters: int
    held: int
    matrices: int


def layer_modules(spec: ModelSpec, split_dlayer: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module, on the meta device, of each layer of :func:`fft.models.layers.pipeline_layers`."""
    halves = ("attention", "mlp") if split_dlayer else (None,)
    decoder = [(f"{spec.base}.layers.{i}", half) for i in range(spec.config.num_hidden_layers) for half in halves]
    embedding = f"{spec.base}.embed_tokens"
    paths = [embedding, *decoder, f"{spec.base}.norm", embedding if spec.tied else "lm_head"]
    modules = []
    for path in paths:
        path, half = path if isinstance(path, tuple) else (path, None)
        modules.append((path, decoder_half(spec.skeleton.get_submodule(path), half)))
    return modules


def layer_costs(spec: ModelSpec, seq_len: int, split_dlayer: bool = False, tensor: int = 1) -> list[LayerCost]:
    """Costs of each pipeline layer on one of ``tensor`` ranks.

    Attention counts the average causal span of a ``seq_len`` row, a mixture of experts those experts that a token is
    sent to; the embedding is a lookup and costs nothing.
    """
    modules = layer_modules(spec, split_dlayer)
    shards = spec.shards(0, tensor)
    costs = [_cost(spec, path, module, seq_len, shards) for path, module in modules]
    first, last = costs[0], costs[-1]
    own = 0 if spec.tied else last.parameters
    embedding = LayerCost(0.0, first.parameters, first.held, first.matrices)
    return [embedding, *costs[1:-1], LayerCost(last.flops, own, last.held, last.matrices)]


def _cost(spec: ModelSpec, path: str, module: nn.Module, seq_len: int, shards: Mapping[str, Shard]) -> LayerCost:
    flops, parameters, held, matrices = 0.0, 0, 0, 0
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        shard = shards.get(f"{path}.{name}")
        share = prod(shape if shard is None else shard.local_shape)
        flops += prod(shape) * _share_used(spec, shape)
        parameters += prod(shape)
        held += share
        matrices += share if len(shape) > 1 else 0
    attends = any(name.startswith("self_attn.") for name, _ in module.named_parameters())
    if attends:
        flops += spec.config.num_attention_heads * spec.head_size * seq_len  # q.k and weights.v: seq_len / 2 keys
    return LayerCost(flops, parameters, held, matrices)


def _share_used(spec: ModelSpec, shape: tuple[int, ...]) -> float:
    """Experts are stored as [experts, .., ..]; a token goes through some of them."""
    return spec.config.num_experts_per_tok / shape[0] if len(shape) == 3 else 1.0
