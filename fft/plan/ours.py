"""Our own trainer as a plan sees it: its layers' products, what it does with a layout, and the memory of a stage."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.models.layers import DecoderLayer
from fft.models.spec import DTYPES, ModelSpec
from fft.parallel.mesh import MeshSizes
from fft.plan.choice import LayoutChoice
from fft.plan.hardware import Device
from fft.plan.shape import Block, Product, Shape
from fft.plan.stack import Stack
from fft.planning.activations import LayerActivations, layer_activations
from fft.planning.costs import LayerCost, PlannedLayer, layer_costs, planned_layers
from fft.planning.layout import circumstances, layer_memory
from fft.planning.memory import Circumstances, LayerMemory, StageMemory, stage_memory
from fft.planning.objective import DPO

#: With fused operators, FlashAttention-2's kernels, ZeRO-1, gradients summed in fp32 and scattered after the pipeline,
#: messages that block, two at a time. Bytes are those that docs/layouts.md counts.
OURS = Stack(
    logits=12.0,
    reduced=4.0,
    zero=1,
    blocking=True,
    paired=True,
    scattered=True,
    numbers=8,
    accumulated=10.0,
    step=46.0,
)
#: On processors operators are PyTorch's, a logit becomes its gradient in a float32 beside it, and the head's gradient
#: is made in 32 bits, since no product of 16 there gives 32; so is a copy of each gradient, before it is added to its
#: sum. gloo has no reduce-scatter that sends half.
ON_CPU = replace(
    OURS,
    fused_norms=False,
    fused_inner=False,
    logits=34.0,
    wide_head=True,
    scattered="messages",
    accumulated=18.0,
)


def stack_on(device: Device, objective: str = "lm") -> Stack:
    """What our trainer does on a device, of models whose heads are trained."""
    stack = ON_CPU if device.cpu else OURS
    return replace(stack, logits_twice=True) if objective == DPO else stack


@dataclass(frozen=True)
class Job:
    """What is to be planned: a model, rows of ``seq`` tokens, and so many tokens a step."""

    spec: ModelSpec
    name: str
    args: TrainArguments
    step_tokens: int

    @property
    def seq(self) -> int:
        """Tokens of a row."""
        return self.args.seq_len


def shape_of_spec(spec: ModelSpec, name: str, split: bool) -> Shape:
    """A model's decoder layers, or their halves, as products, read off its modules.

    Raises :class:`UserError` for a model that sees images.
    """
    if spec.images is not None:
        raise UserError(f"{name} sees images, whose towers are not planned here: use fft.train --dry_run.")
    config, text = spec.config, spec.text
    layers = [layer for layer in planned_layers(spec, split) if layer.kind is DecoderLayer]
    parts = spec.shards(0, 2) if text.num_attention_heads % 2 == 0 else {}
    dims = {path: shard.dim for path, shard in parts.items()}
    known: dict[tuple, Block] = {}
    blocks = []
    for layer in layers:
        block = _block(spec, layer, dims)
        blocks.append(known.setdefault((block.products, block.window, block.norms), block))
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    sizes = text.hidden_size, text.num_attention_heads, kv_heads, spec.head_size, text.vocab_size
    return Shape(name or config.model_type, *sizes, spec.tied, tuple(blocks))


def _block(spec: ModelSpec, layer: PlannedLayer, dims: dict[str, int]) -> Block:
    products, qkv, active, outs, norms = [], 0, 0.0, 0.0, 0
    for name, parameter in layer.modules[layer.path].named_parameters():
        shape, dim = tuple(parameter.shape), dims.get(f"{layer.path}.{name}")
        attends = name.startswith("self_attn.")
        if len(shape) == 2:
            split = {0: "out", 1: "into"}.get(-1 if dim is None else dim, "")
            products.append(Product(shape[0], shape[1], split))
            qkv += shape[0] if attends and split != "into" else 0
            if not attends and shape[1] == spec.text.hidden_size and split != "":
                outs += shape[0]
            elif not attends and split == "into":
                active += shape[1]
        elif len(shape) == 3:
            last = "down" in name
            into, out = (shape[2], shape[1]) if shape[1 if last else 2] == spec.text.hidden_size else shape[1:]
            products.append(Product(out, into, "into" if last else "out", spec.experts_per_token, shape[0]))
            outs, active = (
                (outs, active + into * spec.experts_per_token)
                if last
                else (
                    outs + out * spec.experts_per_token,
                    active,
                )
            )
        else:
            norms += shape == (spec.text.hidden_size,) and "bias" not in name
    window = spec.window(int(layer.path.rpartition(".")[2])) if qkv else None
    return Block(tuple(products), qkv, active, outs >= 1.5 * active > 0, norms, window)


class Memory:
    """Memory of our stages, as :mod:`fft.planning` predicts it; what choices share is found out once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._specs = {kept: replace(job.spec, fused=None, selective=kept) for kept in (False, True)}
        self._known: dict[tuple, tuple[list[LayerMemory], Circumstances]] = {}
        self._ran: dict[tuple, list[LayerActivations]] = {}
        self._counted: dict[tuple, list[LayerCost]] = {}

    def of(self, choice: LayoutChoice) -> Callable[[int, int, int], StageMemory]:
        """Of a stage with layers ``start`` to ``stop`` of the pipeline's (embedding, decoder, norm, head)."""
        layers, at = self._layers(choice)

        @cache
        def held(stage: int, start: int, stop: int) -> StageMemory:
            return stage_memory(layers, start, stop, stage, at)

        return held

    def longest(self, choice: LayoutChoice, bounds: tuple[int, ...], limit: float) -> int:
        """Tokens of the longest row that fits, about: activations grow with it, all else stays."""
        layers, at = self._layers(choice)
        unit = 1024 * choice.sequence
        low, high = 0, 4096

        def fits(units: int) -> bool:
            factor = units * unit / (choice.micro * self._job.seq)
            grown = [layers[0], *(_grown(layer, factor) for layer in layers[1:-1]), layers[-1]]
            row = replace(at, tokens=units * unit // choice.sequence, row=units * unit)
            stages = range(len(bounds) - 1)
            return all(stage_memory(grown, bounds[s], bounds[s + 1], s, row).total <= limit for s in stages)

        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * unit

    def _layers(self, choice: LayoutChoice) -> tuple[list[LayerMemory], Circumstances]:
        sizes = choice.sequence, choice.tensor, choice.expert, choice.micro, choice.recompute == "selective"
        spec, args, mesh = self._specs[sizes[-1]], arguments_of(self._job, choice), mesh_of(choice)
        key = *sizes, choice.split, choice.offload
        if key not in self._known:
            costs = self._costs(choice)
            at = circumstances(args, spec, mesh, False, costs)
            if (ran := self._ran.get(key[:-1])) is None:
                ran = self._ran[key[:-1]] = layer_activations(spec, at.row, choice.split, mesh)
            self._known[key] = layer_memory(args, spec, mesh, at, costs, None, ran), at
        layers, at = self._known[key]
        return layers, replace(
            at,
            stages=choice.pipe,
            micro_batches=choice.accumulated,
            replicas=choice.data * choice.sequence,
            interval=args.checkpoint_grad_interval,
        )

    def _costs(self, choice: LayoutChoice) -> list[LayerCost]:
        key = choice.split, choice.tensor, choice.expert
        if key not in self._counted:
            self._counted[key] = layer_costs(self._job.spec, self._job.seq, *key)
        return self._counted[key]


def _grown(layer: LayerMemory, factor: float) -> LayerMemory:
    saved, forward, backward = (int(x * factor) for x in (layer.saved, layer.forward, layer.backward))
    return replace(layer, saved=saved, forward=forward, backward=backward)


def mesh_of(choice: LayoutChoice) -> MeshSizes:
    """A choice's ranks."""
    return MeshSizes(choice.data, choice.pipe, choice.sequence, choice.tensor, choice.expert)


def arguments_of(job: Job, choice: LayoutChoice, bounds: tuple[int, ...] | None = None) -> TrainArguments:
    """A run's settings with those of a choice; ``bounds`` are of the pipeline's layers."""
    return replace(job.args, **choice_flags(choice, bounds))


def choice_flags(choice: LayoutChoice, bounds: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The flags that make a choice, by name."""
    sizes = "" if bounds is None else ",".join(str(b - a) for a, b in pairwise(bounds))
    return {
        "pipe_parallel_size": choice.pipe,
        "model_parallel_size": choice.tensor,
        "sequence_parallel_size": choice.sequence,
        "ulysses_degree": choice.ulysses,
        "expert_parallel_size": choice.expert,
        "partition_method": sizes if choice.pipe > 1 and sizes else "fast",
        "split_dlayer": choice.split,
        "checkpoint_grad_selective": choice.recompute == "selective",
        "checkpoint_grad_interval": choice.recompute if isinstance(choice.recompute, int) else 0,
        "offload_optimizer": choice.offload,
        "per_device_train_batch_size": choice.micro,
        "gradient_accumulation_steps": choice.accumulated,
    }


def read_job(model: str, seq_len: int, step_tokens: int) -> Job:
    """A model directory or a config.json. Raises :class:`UserError` for what is not trained."""
    from fft.planning.preflight import lay_out

    args = TrainArguments(model=model, seq_len=seq_len, dry_run=True)
    config, _ = lay_out(args, 1)
    return Job(ModelSpec(config, DTYPES[args.dtype]), config.model_type, args, step_tokens)
