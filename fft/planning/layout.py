"""Which rank does what, and what it costs: stages and their memory, planned and printed before anything is launched."""

from dataclasses import dataclass, replace
from itertools import pairwise

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.models.lora import Lora
from fft.models.spec import ModelSpec
from fft.parallel.mesh import MeshSizes
from fft.planning.activations import layer_activations
from fft.planning.costs import LayerCost, first_trained, layer_costs, multiply_adds
from fft.planning.memory import Circumstances, LayerMemory, StageMemory, loss_memory, stage_memory
from fft.planning.partition import pipeline_bubble, stage_bounds

_GB = 1e9


@dataclass(frozen=True)
class Layout:
    """The mesh, and of each pipeline stage its layers and the memory of a rank. ``bounds`` are stages + 1 indices."""

    mesh: MeshSizes
    bounds: list[int]
    costs: list[LayerCost]
    memory: list[StageMemory]


def plan_layout(args: TrainArguments, spec: ModelSpec, mesh: MeshSizes, host: bool) -> Layout:
    """Cut the model into stages by ``--partition_method``; ``host`` is for a device that is the CPU.

    It is that of transformers' own operators. Raises :class:`UserError` for stages that cannot be, and for parameters
    to train or to freeze that the model does not have.
    """
    spec = replace(spec, fused=None, lora=Lora.of(args), frozen=args.freeze, selective=args.checkpoint_grad_selective)
    if mesh.expert > 1 and not spec.experts:
        raise UserError(
            f"--expert_parallel_size {mesh.expert}: the experts of a {spec.config.model_type} are computed in a "
            "way that is not shared out here: set it to 1, and raise --model_parallel_size or --pipe_parallel_size."
        )
    costs = layer_costs(spec, args.seq_len, args.split_dlayer, mesh.tensor, mesh.expert)
    tokens = args.seq_len * args.per_device_train_batch_size
    ran = layer_activations(spec, tokens, args.split_dlayer, mesh)
    at = Circumstances(
        stages=mesh.pipe,
        micro_batches=args.gradient_accumulation_steps,
        replicas=mesh.data * mesh.sequence,
        tokens=tokens // mesh.sequence,
        row=tokens,
        hidden_size=spec.text.hidden_size,
        head_size=spec.head_size,
        itemsize=spec.dtype.itemsize,
        interval=args.checkpoint_grad_interval,
        tied=spec.tied,
        zero=zero_stage(args, mesh),
        host=host,
        offload=args.offload_optimizer,
        lowest=first_trained(costs),
        expert=mesh.expert,
    )
    decoder = range(1, len(ran) - 1)
    layers = [
        LayerMemory(c.held, c.matrices, a.saved, a.forward, a.backward, i in decoder, c.trained, c.experts)
        for i, (c, a) in enumerate(zip(costs, ran, strict=False))  # the last one is the head
    ]
    vocabulary = costs[-1].held // at.hidden_size
    # ZeRO's own optimizer makes its sums after backward.
    summed = not args.offload_optimizer and (args.dtype == "bf16" or not at.zero)
    head = bool(costs[-1].trained), getattr(spec.text, "normalized_head", False), summed
    layers.append(loss_memory(at.tokens, at.hidden_size, vocabulary, at.itemsize, *head))

    def memory(stage: int, start: int, stop: int) -> StageMemory:
        return stage_memory(layers, start, stop, stage, at)

    bounds = stage_bounds(
        args.partition_method,
        [cost.flops + cost.backward for cost in costs],
        [cost.parameters for cost in costs],
        mesh.pipe,
        lambda *of: memory(*of).total,
        args.device_memory * 1e9,
    )
    return Layout(mesh, bounds, costs, [memory(stage, *ends) for stage, ends in enumerate(pairwise(bounds))])


def zero_stage(args: TrainArguments, mesh: MeshSizes) -> int:
    """What ``--zero_stage`` means: auto is 1, but 0 in fp32, where that spares copies, if nobody is there to share."""
    if args.zero_stage != "auto":
        return int(args.zero_stage)
    return 0 if args.dtype == "fp32" and mesh.data * mesh.sequence == 1 and not args.offload_optimizer else 1


def bubble_of(args: TrainArguments, layout: Layout) -> float:
    """Share of a step that the layout's stages wait, by the arithmetic that each has to do."""
    lowest, head = first_trained(layout.costs), len(layout.costs) - 1
    forward, backward = [], []
    for stage, ends in enumerate(pairwise(layout.bounds)):
        times = [0.0, 0.0]
        for layer in range(*ends):
            cost = layout.costs[layer]
            needs = stage > 0 or layer >= lowest  # a stage that receives goes back to what it received
            again = cost.flops if args.checkpoint_grad_interval and 0 < layer < head - 1 and needs else 0.0
            # The loss forms the head's gradients in its forward.
            times[0] += cost.flops + (cost.backward if layer == head else 0.0)
            times[1] += again + (cost.backward if needs and layer != head else 0.0)
        forward.append(times[0])
        backward.append(times[1])
    return pipeline_bubble(layout.mesh.pipe, args.gradient_accumulation_steps, forward, backward)


def describe(args: TrainArguments, name: str, layout: Layout) -> str:
    """The layout as text: sizes, who sits where, a table of the stages, what a step computes and how long it waits."""
    mesh, costs = layout.mesh, layout.costs
    parameters, frozen = sum(cost.parameters for cost in costs), any(cost.trained < cost.held for cost in costs)
    sizes = f"data {mesh.data} x pipe {mesh.pipe} x sequence {mesh.sequence} x tensor {mesh.tensor}"
    sizes += f", experts over {mesh.expert}" if mesh.expert > 1 else ""
    lines = [f"{name}, {_count(parameters)} parameters, {args.dtype}; world {mesh.world} = {sizes}"]
    if mesh.world > 1:
        lines += _picture(mesh)
    lines += _table(layout)
    which = "adapters" if args.lora_dim else f"all but {args.freeze}" if frozen else "all parameters"
    optimizer = ", the optimizer's in the machine's memory" if args.offload_optimizer else ""
    lines.append(
        f"GB of a rank, {which} trained{optimizer}; total = weights+grads + optimizer + the larger of activations + "
        "loss, and step"
    )
    micro_batches = args.gradient_accumulation_steps
    tokens = mesh.data * micro_batches * args.per_device_train_batch_size * args.seq_len
    flops = 2 * tokens * sum(map(sum, multiply_adds(costs)))
    bubble = bubble_of(args, layout)
    most = "at most " if args.ragged else ""
    lines.append(
        f"a step: {most}{tokens:,} tokens, {_flops(flops)} of a forward and a backward, pipeline bubble {bubble:.1%}"
    )
    return "\n".join(lines)


def _table(layout: Layout) -> list[str]:
    """GB of one rank, by what they are for: the fullest moment is a backward or, with its copies, a step."""
    heads = ("stage", "layers", "parameters/rank", "weights+grads", "optimizer", "activations", "loss", "step", "total")
    rows = [[*heads, "time"]]
    whole = sum(cost.flops + cost.backward for cost in layout.costs)
    for stage, (memory, (a, b)) in enumerate(zip(layout.memory, pairwise(layout.bounds), strict=True)):
        own = layout.costs[a:b]
        bytes_ = (memory.weights, memory.optimizer, memory.activations, memory.loss, memory.step, memory.total)
        share = sum(cost.flops + cost.backward for cost in own) / whole
        held = sum(cost.held for cost in own)
        rows.append([str(stage), f"{a}-{b - 1}", f"{held:,}", *(f"{x / _GB:.2f}" for x in bytes_), f"{share:.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _picture(mesh: MeshSizes) -> list[str]:
    """Ranks by stage (rows) and replica (columns): sequence-parallel ranks side by side, tensor-parallel ones a-b."""

    def shared(pipe: int, data: int, sequence: int) -> str:
        first, last = (mesh.rank(pipe, data, sequence, tensor) for tensor in (0, mesh.tensor - 1))
        return f"{first}-{last}" if mesh.tensor > 1 else f"{first}"

    replicas, shares = _ends(mesh.data), _ends(mesh.sequence)
    rows = [["ranks", *("..." if d is None else f"replica {d}" for d in replicas)]]
    for pipe in range(mesh.pipe):
        cells = [
            "..." if d is None else " ".join("..." if s is None else shared(pipe, d, s) for s in shares)
            for d in replicas
        ]
        rows.append([f"stage {pipe}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ends(size: int) -> list[int | None]:
    """All of a few; the first two and the last of many."""
    return list(range(size)) if size <= 4 else [0, 1, None, size - 1]


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _flops(number: float) -> str:
    return f"{number / 1e15:,.1f} PFLOP" if number >= 1e15 else f"{number / 1e12:,.2f} TFLOP"
