"""Which rank does what, and what it costs: stages and their memory, planned and printed before anything is launched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.models.four_bits import check_blocks
from fft.models.layers import Embedding, Head
from fft.models.lora import Lora
from fft.models.spec import ModelSpec
from fft.parallel.image_plan import CHUNK
from fft.parallel.mesh import MeshSizes
from fft.planning.activations import LayerActivations, layer_activations, tower_activations
from fft.planning.costs import TOWER, LayerCost, first_trained, layer_costs, multiply_adds, tower_costs
from fft.planning.image_load import ImageLoad, assumed_load
from fft.planning.memory import Circumstances, LayerMemory, SharedTowerMemory, StageMemory, loss_memory, stage_memory
from fft.planning.objective import DPO
from fft.planning.partition import pipeline_bubble, stage_bounds
from fft.planning.tower_activations import SeenRow

_GB = 1e9


@dataclass(frozen=True)
class Layout:
    """The mesh, and of each pipeline stage its layers and the memory of a rank. ``bounds`` are stages + 1 indices.

    ``load`` are the images of its rows; ``shared`` are the layers of a tower that all stages have.
    """

    mesh: MeshSizes
    bounds: list[int]
    costs: list[LayerCost]
    memory: list[StageMemory]
    load: ImageLoad | None = None
    shared: tuple[LayerCost, ...] = ()

    @property
    def every(self) -> list[LayerCost]:
        """All layers of the model, in the order in which they are run."""
        return [*self.shared, *self.costs]

    @property
    def tower(self) -> int:
        """How many layers of the pipeline are a tower's, its first."""
        return sum(cost.kind in TOWER for cost in self.costs)


def plan_layout(
    args: TrainArguments, spec: ModelSpec, mesh: MeshSizes, host: bool, load: ImageLoad | None = None
) -> Layout:
    """Cut the model into stages by ``--partition_method``; ``host`` is for a device that is the CPU.

    It is that of transformers' own operators. The images that a model sees are those of ``load``, or what is assumed.
    Raises :class:`UserError` for stages that cannot be, and for parameters to train or to freeze that the model does
    not have.
    """
    trained = {"lora": Lora.of(args), "frozen": args.freeze, "four_bits": args.load_in_4bit}
    spec = replace(spec, fused=None, selective=args.checkpoint_grad_selective, **trained)
    check_blocks(spec.packed, spec.shards(0, mesh.tensor), mesh.tensor)
    if mesh.expert > 1 and not spec.experts:
        raise UserError(
            f"--expert_parallel_size {mesh.expert}: the experts of a {spec.config.model_type} are computed in a "
            "way that is not shared out here: set it to 1, and raise --model_parallel_size or --pipe_parallel_size."
        )
    load = None if spec.images is None else load or assumed_load(spec.images, args.seq_len)
    costs = layer_costs(spec, args.seq_len, args.split_dlayer, mesh.tensor, mesh.expert, load)
    ranks = mesh.sequence * mesh.tensor  # of a row: each of them runs the whole tower
    costs = [replace(cost, repeated=ranks) if cost.kind in TOWER else cost for cost in costs]
    if _logits_twice(args, costs):
        costs[-1] = replace(costs[-1], again=costs[-1].flops)
    shared = tuple(tower_costs(spec, load)) if load is not None and spec.shared_tower else ()
    at = circumstances(args, spec, mesh, host, costs)
    if load is not None and shared:
        learns = any(cost.trained for cost in shared)  # so that features have gradients
        at = replace(
            at,
            tower=_shared(spec, load, at, shared, mesh.pipe * mesh.sequence, args.per_device_train_batch_size),
            lowest=0 if learns else at.lowest,
        )
    layers = layer_memory(args, spec, mesh, at, costs, load)

    def memory(stage: int, start: int, stop: int) -> StageMemory:
        return stage_memory(layers, start, stop, stage, at)

    bounds = stage_bounds(
        args.partition_method,
        [cost.time for cost in costs],
        [cost.parameters for cost in costs],
        mesh.pipe,
        lambda *of: memory(*of).total,
        args.device_memory * 1e9,
        at.embedding,
        max(0, args.encoder_pipe_parallel_size),
    )
    held = [memory(stage, *ends) for stage, ends in enumerate(pairwise(bounds))]
    return Layout(mesh, bounds, costs, held, load, shared)


def circumstances(
    args: TrainArguments, spec: ModelSpec, mesh: MeshSizes, host: bool, costs: list[LayerCost]
) -> Circumstances:
    """What the memory of a run's stages depends on."""
    tokens = args.seq_len * args.per_device_train_batch_size
    return Circumstances(
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
        embedding=next(i for i, cost in enumerate(costs) if cost.kind is Embedding),
    )


def _shared(
    spec: ModelSpec, load: ImageLoad, at: Circumstances, costs: Sequence[LayerCost], ranks: int, samples: int
) -> SharedTowerMemory:
    """A tower that all stages have: a rank's share of the images of a step, as many at once as it encodes at once."""
    share = -(-load.most * samples * at.micro_batches // ranks)
    chunks = max(1, -(-share // CHUNK))
    row = SeenRow(spec, replace(load, most=-(-share // chunks)), 1, 1, 1)
    ran = tower_activations(spec, row)
    kept, trained = sum(layer.saved for layer in ran), sum(cost.trained for cost in costs)
    alone = max(layer.saved + layer.forward for layer in ran)
    saved, forward, backward = chunks * row.pixels, alone, 0
    if trained and at.interval:  # of blocks, the second layer to the last but one, their inputs
        first, *blocks, last = ran
        saved += chunks * (first.saved + len(blocks) * row.states + last.saved)
        forward = max(layer.saved + layer.forward for layer in blocks)
        backward = max(layer.saved + max(layer.forward, layer.backward) for layer in blocks)
    elif trained:
        saved += chunks * kept
        forward, backward = max(layer.forward for layer in ran), max(layer.backward for layer in ran)
    held, matrices = sum(cost.held for cost in costs), sum(cost.matrices for cost in costs)
    layer = LayerMemory(held, matrices, saved, forward, backward, trained=trained)
    features = SeenRow(spec, load, samples, at.row, at.tokens).features
    return SharedTowerMemory(layer, at.micro_batches * features * (2 if trained else 1))


def layer_memory(
    args: TrainArguments,
    spec: ModelSpec,
    mesh: MeshSizes,
    at: Circumstances,
    costs: list[LayerCost],
    load: ImageLoad | None,
    ran: Sequence[LayerActivations] | None = None,
) -> list[LayerMemory]:
    """Every layer's memory; the last one is the head with its loss. ``ran`` is what all others were found to keep."""
    row, taken = None, [None] * len(costs)
    if load is not None:
        row = SeenRow(spec, load, args.per_device_train_batch_size, at.row, at.tokens, 1 + args.split_dlayer)
        taken = row.taken([cost.kind for cost in costs])
    ran = layer_activations(spec, at.row, args.split_dlayer, mesh, row) if ran is None else ran
    layers = [
        LayerMemory(c.held, c.matrices, a.saved, a.forward, a.backward, c.recomputes, c.trained, c.experts, t)
        for c, a, t in zip(costs, ran, taken, strict=False)
    ]
    layers = [
        layer.in_four_bits(cost.packed, cost.largest_packed * at.itemsize)
        for layer, cost in zip(layers, costs, strict=False)
    ]
    vocabulary = costs[-1].held // at.hidden_size
    # ZeRO's own optimizer makes its sums after backward.
    summed = not args.offload_optimizer and (args.dtype == "bf16" or not at.zero)
    head = bool(costs[-1].trained), getattr(spec.text, "normalized_head", False), summed, _logits_twice(args, costs)
    loss = loss_memory(at.tokens, at.hidden_size, vocabulary, at.itemsize, *head)
    return [*layers, replace(loss, taken=taken[-1])]


def _logits_twice(args: TrainArguments, costs: Sequence[LayerCost]) -> bool:
    """Of pairs: what gradients of a head that is trained are multiplied by is known when all logits are gone."""
    return args.objective == DPO and costs[-1].trained > 0


def zero_stage(args: TrainArguments, mesh: MeshSizes) -> int:
    """What ``--zero_stage`` means: auto is 1, but 0 in fp32, where that spares copies, if nobody is there to share."""
    if args.zero_stage != "auto":
        return int(args.zero_stage)
    return 0 if args.dtype == "fp32" and mesh.data * mesh.sequence == 1 and not args.offload_optimizer else 1


def bubble_of(args: TrainArguments, layout: Layout) -> float:
    """Share of a step that the layout's stages wait, by the arithmetic that each has to do."""
    lowest = first_trained(layout.costs)
    forward, backward = [], []
    for stage, ends in enumerate(pairwise(layout.bounds)):
        times = [0.0, 0.0]
        for layer in range(*ends):
            cost = layout.costs[layer]
            needs = stage > 0 or layer >= lowest  # a stage that receives goes back to what it received
            again = cost.flops if args.checkpoint_grad_interval and cost.recomputes and needs else cost.again
            # The loss forms the head's gradients in its forward, unless it makes logits twice.
            head = cost.kind is Head and not cost.again
            times[0] += cost.repeated * (cost.flops + (cost.backward if head else 0.0))
            times[1] += cost.repeated * (again + (cost.backward if needs and not head else 0.0))
        forward.append(times[0])
        backward.append(times[1])
    stages, steps = layout.mesh.pipe, args.gradient_accumulation_steps
    bubble = pipeline_bubble(stages, steps, forward, backward)
    if not layout.shared:
        return bubble
    busy = steps * (sum(forward) + sum(backward))
    encoding = steps * _encoding(args, layout)
    return 1 - (busy + encoding) / (busy / (1 - bubble) + encoding)


def _encoding(args: TrainArguments, layout: Layout) -> float:
    """The time in which all ranks together encode the images of a micro-batch, and go back, by a tower they share."""
    trained = any(cost.trained for cost in layout.shared)
    backward = sum(multiply_adds(layout.every)[1][: len(layout.shared)])
    forward = sum(cost.flops for cost in layout.shared)
    again = forward if trained and args.checkpoint_grad_interval else 0.0
    return layout.mesh.tensor * (forward + again + backward)  # tensor ranks do the same


def describe(args: TrainArguments, name: str, layout: Layout) -> str:
    """The layout as text: sizes, who sits where, a table of the stages, what a step computes and how long it waits."""
    mesh, costs = layout.mesh, layout.every
    parameters, frozen = sum(cost.parameters for cost in costs), any(cost.trained < cost.held for cost in costs)
    sizes = f"data {mesh.data} x pipe {mesh.pipe} x sequence {mesh.sequence} x tensor {mesh.tensor}"
    sizes += f", experts over {mesh.expert}" if mesh.expert > 1 else ""
    lines = [f"{name}, {told_count(parameters)} parameters, {args.dtype}; world {mesh.world} = {sizes}"]
    if mesh.world > 1:
        lines += _picture(mesh)
    lines += _table(layout)
    which = "adapters" if args.lora_dim else f"all but {args.freeze}" if frozen else "all parameters"
    share = sum(cost.packed for cost in costs) / sum(cost.held for cost in costs)
    packed = f", {share:.0%} of all parameters in four bits (NF4)" if share else ""
    optimizer = ", the optimizer's in the machine's memory" if args.offload_optimizer else ""
    lines.append(
        f"GB of a rank, {which} trained{packed}{optimizer}; total = weights+grads + optimizer + the larger of "
        "activations + loss, and step"
    )
    micro_batches = args.gradient_accumulation_steps
    tokens = mesh.data * micro_batches * args.per_device_train_batch_size * args.seq_len
    flops = 2 * tokens * sum(map(sum, multiply_adds(costs)))
    bubble = bubble_of(args, layout)
    most = "at most " if args.ragged else ""
    if layout.load is not None:
        lines.append(_images(args, layout, layout.load))
    lines.append(
        f"a step: {most}{tokens:,} tokens, {_flops(flops)} of a forward and a backward, pipeline bubble {bubble:.1%}"
    )
    return "\n".join(lines)


def _table(layout: Layout) -> list[str]:
    """GB of one rank, by what they are for: the fullest moment is a backward or, with its copies, a step."""
    heads = ("stage", "layers", "parameters/rank", "weights+grads", "optimizer", "activations", "loss", "step", "total")
    rows = [[*heads, "time", *["of"] * bool(layout.tower)]]
    whole = sum(cost.time for cost in layout.costs)
    for stage, (memory, (a, b)) in enumerate(zip(layout.memory, pairwise(layout.bounds), strict=True)):
        own = layout.costs[a:b]
        bytes_ = (memory.weights, memory.optimizer, memory.activations, memory.loss, memory.step, memory.total)
        share = sum(cost.time for cost in own) / whole
        held = sum(cost.held for cost in own)
        rows.append([str(stage), f"{a}-{b - 1}", f"{held:,}", *(f"{x / _GB:.2f}" for x in bytes_), f"{share:.1%}"])
        if layout.tower:
            parts = dict.fromkeys("tower" if cost.kind in TOWER else "decoder" for cost in own)
            rows[-1].append(" + ".join(parts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _images(args: TrainArguments, layout: Layout, load: ImageLoad) -> str:
    """What is known of a run's images, and who encodes them."""
    whole = f"at most {load.most * args.per_device_train_batch_size:,} in a micro-batch"
    counted = "as the tables' manifests count them" if load.known else "assumed, since no table has counted them"
    said = f"images: {load.per_token:.2f} patches a token, {whole}, each sees {load.seen:,.0f}; {counted}"
    if not layout.shared:
        return said
    ranks, held = layout.mesh.pipe * layout.mesh.sequence, sum(cost.held for cost in layout.shared)
    encoding = _encoding(args, layout)
    time = encoding / (encoding + sum(cost.time for cost in layout.costs))
    return (
        f"{said}\nthe tower, {told_count(held)} parameters, is shared: every rank has all of it, which is in its GB, "
        f"and encodes 1/{ranks} of a step's images before the pipeline, {time:.1%} of its time"
    )


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


def told_count(number: float) -> str:
    """A number of parameters."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _flops(number: float) -> str:
    return f"{number / 1e15:,.1f} PFLOP" if number >= 1e15 else f"{number / 1e12:,.2f} TFLOP"
