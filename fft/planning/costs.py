"""What every pipeline layer costs, read off the model laid out on the meta device: arithmetic and parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from fft.models.layers import decoder_half
from fft.models.spec import ModelSpec
from fft.models.towers import trained_tower
from fft.parallel.tensor_plan import Shard


@dataclass(frozen=True)
class LayerCost:
    """One pipeline layer. ``flops`` are multiply-adds per token in forward, ``backward`` those in backward.

    ``parameters`` are the whole model's, each counted once: a head that is the embedding has none. ``held`` is what one
    tensor- and expert-parallel rank of the layer's stage keeps, ``trained`` what is trained of that, ``matrices`` of
    the latter with two dimensions or more, ``experts`` of the latter those that ranks share out. Gradients of frozen
    weights are not computed.
    """

    flops: float
    backward: float
    parameters: int
    held: int
    trained: int
    matrices: int
    experts: int = 0


def layer_modules(spec: ModelSpec, split_dlayer: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module, on the meta device, of each layer of :func:`fft.models.layers.pipeline_layers`.

    Those of a tower are several modules, in a list.
    """
    halves = ("attention", "mlp") if split_dlayer else (None,)
    decoder = [(f"{spec.base}.layers.{i}", half) for i in range(spec.text.num_hidden_layers) for half in halves]
    paths = [spec.embedding, *decoder, spec.norm, spec.embedding if spec.tied else spec.output]
    modules: list[tuple[str, nn.Module]] = [
        (paths[0], nn.ModuleList(map(spec.skeleton.get_submodule, paths))) for paths in _tower_paths(spec)
    ]
    for path in paths:
        path, half = path if isinstance(path, tuple) else (path, None)
        modules.append((path, decoder_half(spec.skeleton.get_submodule(path), half)))
    return modules


def _tower_paths(spec: ModelSpec) -> list[list[str]]:
    """The modules of each layer of a tower that is trained."""
    if (tower := trained_tower(spec)) is None or spec.shared_tower:
        return []
    blocks = [[tower.block(i), *([tap] if (tap := tower.tap(i)) else [])] for i in range(tower.depth)]
    return [[*tower.first], *blocks, [*tower.last]]


def layer_costs(
    spec: ModelSpec, seq_len: int, split_dlayer: bool = False, tensor: int = 1, expert: int = 1
) -> list[LayerCost]:
    """Costs of each pipeline layer on one of ``tensor`` ranks, which has one in ``expert`` of the experts.

    Attention counts the average causal span of a ``seq_len`` row, a mixture of experts those experts that a token is
    sent to; the embedding is a lookup and costs nothing.
    """
    modules = layer_modules(spec, split_dlayer)
    shards = spec.shards(0, tensor, (0, expert))
    costs = [_cost(spec, path, module, seq_len, shards) for path, module in modules]
    embedding, last = len(_tower_paths(spec)), costs[-1]
    costs[embedding] = replace(costs[embedding], flops=0.0, backward=0.0)
    costs[-1] = replace(last, parameters=0 if spec.tied else last.parameters)
    return costs


def first_trained(costs: Sequence[LayerCost]) -> int:
    """Index of the first layer of which something is trained."""
    return next((layer for layer, cost in enumerate(costs) if cost.trained), len(costs))


def multiply_adds(costs: Sequence[LayerCost]) -> tuple[list[float], list[float]]:
    """Those per token of every layer's forward and backward, which ends at the first layer that is trained."""
    lowest = first_trained(costs)
    return [c.flops for c in costs], [c.backward if layer >= lowest else 0.0 for layer, c in enumerate(costs)]


def _cost(spec: ModelSpec, path: str, module: nn.Module, seq_len: int, shards: Mapping[str, Shard]) -> LayerCost:
    flops, backward, parameters, held, trained, matrices, experts = 0.0, 0.0, 0, 0, 0, 0, 0
    share_used = _share_used(spec, module)
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        shard = shards.get(f"{path}.{name}")
        share = prod(shape if shard is None else shard.local_shape)
        used = prod(shape) * (share_used if ".experts." in f".{name}" else 1.0)
        flops += used
        backward += used * (2 if parameter.requires_grad else 1)  # of what went in, and of the weight
        parameters += prod(shape)
        held += share
        if parameter.requires_grad:
            trained += share
            matrices += share if len(shape) > 1 else 0
            experts += share if shard is not None and shard.experts is not None else 0
    attends = any(name.startswith("self_attn.") for name, _ in module.named_parameters())
    if attends:
        window = min(spec.window(int(path.rpartition(".")[2])) or seq_len, seq_len)
        seen = window - window**2 / (2 * seq_len)  # keys, in the mean over a row's queries; half of it without a window
        scores = 2 * spec.text.num_attention_heads * spec.head_size * seen  # q.k and weights.v
        flops, backward = flops + scores, backward + 2 * scores
    return LayerCost(flops, backward, parameters, held, trained, matrices, experts)


def _share_used(spec: ModelSpec, module: nn.Module) -> float:
    """Parameters of experts are [experts, ...]; a token goes through some of them."""
    experts = [p.shape[0] for name, p in module.named_parameters() if ".experts." in f".{name}"]
    return spec.experts_per_token / experts[0] if experts else 1.0
