"""What every pipeline layer costs, read off the model laid out on the meta device: arithmetic and parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from torch import nn

from fft.images.rules import GRIDS
from fft.models.carried import ModelLayer
from fft.models.layers import DecoderLayer, Embedding, FinalNorm, Head, decoder_half
from fft.models.spec import ModelSpec
from fft.models.towers import trained_tower
from fft.models.vision_layers import Merger, Patches, VisionBlock
from fft.parallel.tensor_plan import Shard
from fft.planning.image_load import ImageLoad, assumed_load

#: The layers of a tower.
TOWER = (Patches, VisionBlock, Merger)
#: Modules of a tower's first layer whose weights patches are multiplied by; others are added, or looked up.
_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of :func:`fft.models.layers.pipeline_layers`: its class, and its modules on the meta device by name."""

    kind: type[ModelLayer]
    modules: dict[str, nn.Module]

    @property
    def path(self) -> str:
        """The name of its first module."""
        return next(iter(self.modules))


@dataclass(frozen=True)
class LayerCost:
    """One pipeline layer. ``flops`` are multiply-adds per token in forward, ``backward`` those in backward.

    Those of a tower are of the patches that a token of a row has in the mean. ``parameters`` are the whole model's,
    each counted once: a head that is the embedding has none. ``held`` is what one tensor- and expert-parallel rank of
    the layer's stage keeps, ``trained`` what is trained of that, ``matrices`` of the latter with two dimensions or
    more, ``experts`` of the latter those that ranks share out. Gradients of frozen weights are not computed.
    ``repeated`` says how many ranks that share a row compute the same. ``pair`` are the multiply-adds in forward for a
    query and a key that it sees, of a decoder layer whose ``window`` has so many (None: all before it). ``again`` are
    those of its forward that its backward needs once more, whatever is recomputed. Of what is ``held``, ``packed`` are
    in four bits, of which ``largest_packed`` are one weight's at most.
    """

    flops: float
    backward: float
    parameters: int
    held: int
    trained: int
    matrices: int
    experts: int = 0
    kind: type[ModelLayer] = DecoderLayer
    repeated: int = 1
    pair: float = 0.0
    window: int | None = None
    again: float = 0.0
    packed: int = 0
    largest_packed: int = 0

    @property
    def time(self) -> float:
        """Of a rank, in any unit that layers share."""
        return (self.flops + self.backward + self.again) * self.repeated

    @property
    def recomputes(self) -> bool:
        """Whether ``--checkpoint_grad_interval`` may run it again."""
        return self.kind in (VisionBlock, DecoderLayer)


def planned_layers(spec: ModelSpec, split_dlayer: bool = False) -> list[PlannedLayer]:
    """The layers of :func:`fft.models.layers.pipeline_layers`, in their order."""
    get = spec.skeleton.get_submodule
    layers = [] if spec.shared_tower else tower_layers(spec)
    layers.append(PlannedLayer(Embedding, {spec.embedding: get(spec.embedding)}))
    for index in range(spec.text.num_hidden_layers):
        path = f"{spec.base}.layers.{index}"
        for half in ("attention", "mlp") if split_dlayer else (None,):
            layers.append(PlannedLayer(DecoderLayer, {path: decoder_half(get(path), half)}))
    layers.append(PlannedLayer(FinalNorm, {spec.norm: get(spec.norm)}))
    head = spec.embedding if spec.tied else spec.output
    return [*layers, PlannedLayer(Head, {head: get(head)})]


def tower_layers(spec: ModelSpec) -> list[PlannedLayer]:
    """Those of a tower that sees images, which are the first of the pipeline unless all stages share it."""
    get, layers = spec.skeleton.get_submodule, []
    if (tower := trained_tower(spec)) is not None:
        layers.append(PlannedLayer(Patches, {path: get(path) for path in tower.first}))
        for index in range(tower.depth):
            paths = tower.block(index), tower.tap(index)
            layers.append(PlannedLayer(VisionBlock, {path: get(path) for path in paths if path is not None}))
        layers.append(PlannedLayer(Merger, {path: get(path) for path in tower.last}))
    return layers


def layer_costs(
    spec: ModelSpec,
    seq_len: int,
    split_dlayer: bool = False,
    tensor: int = 1,
    expert: int = 1,
    load: ImageLoad | None = None,
) -> list[LayerCost]:
    """Costs of each pipeline layer on one of ``tensor`` ranks, which has one in ``expert`` of the experts.

    Attention counts the average causal span of a ``seq_len`` row, a mixture of experts those experts that a token is
    sent to; the embedding is a lookup and costs nothing. A tower takes the images of ``load``, or what is assumed.
    """
    shards = spec.shards(0, tensor, (0, expert))
    costs = (
        []
        if spec.images is None or spec.shared_tower
        else tower_costs(spec, load or assumed_load(spec.images, seq_len))
    )
    for layer in planned_layers(spec, split_dlayer):
        if layer.kind not in TOWER:
            use = _text_use(spec, layer.modules[layer.path])
            cost = replace(_cost(layer, shards, use, packed=spec.packed), **_attention(spec, layer))
            costs.append(_attending(cost, cost.pair * float(pairs(seq_len, cost.window)) / seq_len))
    embedding, last = next(i for i, cost in enumerate(costs) if cost.kind is Embedding), costs[-1]
    costs[embedding] = replace(costs[embedding], flops=0.0, backward=0.0)
    costs[-1] = replace(last, parameters=0 if spec.tied else last.parameters)
    return costs


def tower_costs(spec: ModelSpec, load: ImageLoad) -> list[LayerCost]:
    """The same of each of :func:`tower_layers`, which take the images of ``load``, per token of a row."""
    costs, use, block = [], _TowerUse(spec, load), 0
    for layer in tower_layers(spec):
        cost = _cost(layer, {}, use.of(layer), layer.kind is not Patches)
        costs.append(_attending(cost, use.scores(block)) if layer.kind is VisionBlock else cost)
        block += layer.kind is VisionBlock
    return costs


def first_trained(costs: Sequence[LayerCost]) -> int:
    """Index of the first layer of which something is trained."""
    return next((layer for layer, cost in enumerate(costs) if cost.trained), len(costs))


def multiply_adds(costs: Sequence[LayerCost]) -> tuple[list[float], list[float]]:
    """Those per token of every layer's forward and backward, which ends at the first layer that is trained."""
    lowest = first_trained(costs)
    return [c.flops for c in costs], [c.backward if layer >= lowest else 0.0 for layer, c in enumerate(costs)]


#: How often a token of a row, in the mean, goes through the weights of a module: by its name in the model, and theirs.
_Use = Callable[[str, str], float]


def _cost(
    layer: PlannedLayer,
    shards: Mapping[str, Shard],
    use: _Use,
    inputs: bool = True,
    packed: frozenset[str] = frozenset(),
) -> LayerCost:
    """Without the scores of attention; ``inputs`` says whether what goes in has a gradient, ``packed`` are weights in
    four bits."""
    in_four_bits = [0]
    flops, backward, parameters, held, trained, matrices, experts = 0.0, 0.0, 0, 0, 0, 0, 0
    for path, module in layer.modules.items():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            shard = shards.get(f"{path}.{name}")
            share = prod(shape if shard is None else shard.local_shape)
            used = prod(shape) * use(path, name)
            flops += used
            backward += used * (inputs + parameter.requires_grad)  # of what went in, and of the weight
            parameters += prod(shape)
            held += share
            if f"{path}.{name}" in packed:
                in_four_bits.append(share)
            if parameter.requires_grad:
                trained += share
                matrices += share if len(shape) > 1 else 0
                experts += share if shard is not None and shard.experts is not None else 0
    own = LayerCost(flops, backward, parameters, held, trained, matrices, experts, layer.kind)
    return replace(own, packed=sum(in_four_bits), largest_packed=max(in_four_bits))


def _attending(cost: LayerCost, scores: float) -> LayerCost:
    return replace(cost, flops=cost.flops + scores, backward=cost.backward + 2 * scores)


def _text_use(spec: ModelSpec, module: nn.Module) -> _Use:
    """Parameters of experts are [experts, ...]; a token goes through some of them."""
    experts = [p.shape[0] for name, p in module.named_parameters() if ".experts." in f".{name}"]
    share = spec.experts_per_token / experts[0] if experts else 1.0
    return lambda _, name: share if ".experts." in f".{name}" else 1.0


def pairs(tokens: float | np.ndarray, window: int | None = None) -> np.ndarray:
    """Queries times the keys that they see in documents of so many tokens: half of the square without a window."""
    seen = np.minimum(tokens if window is None else window, tokens)
    return seen * np.asarray(tokens) - seen**2 / 2


def _attention(spec: ModelSpec, layer: PlannedLayer) -> dict[str, Any]:
    """q.k and weights.v of a decoder layer, or of the half of one that attends."""
    module = layer.modules[layer.path]
    if not any(name.startswith("self_attn.") for name, _ in module.named_parameters()):
        return {}
    window = spec.window(int(layer.path.rpartition(".")[2]))
    return {"pair": 2.0 * spec.text.num_attention_heads * spec.head_size, "window": window}


class _TowerUse:
    """What a row's images ask of a tower, per token of the row."""

    def __init__(self, spec: ModelSpec, load: ImageLoad) -> None:
        rules, vision = spec.images, spec.config.vision_config
        if rules is None:
            raise ValueError("a model that sees no images has no tower to be used")
        self._patches, self._merged = load.per_token, load.per_token / rules.merge**2
        self._classes = 0 if rules.family in GRIDS else 1  # a tile's token of its class
        side = (rules.tile // rules.patch) ** 2
        self._states = load.per_token * (1 + self._classes / side if self._classes else 1)
        self._seen = load.seen + self._classes
        self._whole = getattr(vision, "fullatt_block_indexes", None)
        self._window = 0 if self._whole is None else (vision.window_size // rules.patch) ** 2
        self._width = spec.tower_width

    def of(self, layer: PlannedLayer) -> _Use:
        """Of a layer's parameters."""
        if layer.kind is VisionBlock:
            return lambda path, _: self._states if path == layer.path else self._merged
        if layer.kind is Merger:
            return lambda *_: self._merged
        modules = {path: dict(module.named_modules()) for path, module in layer.modules.items()}

        def patches(path: str, name: str) -> float:
            return self._patches if isinstance(modules[path][name.rpartition(".")[0]], _PRODUCTS) else 0.0

        return patches

    def scores(self, block: int) -> float:
        """q.k and weights.v of a block: every patch sees all of its image, or of its window."""
        within = self._whole is None or block in self._whole
        return 2 * self._width * self._states * (self._seen if within else min(self._seen, self._window))
