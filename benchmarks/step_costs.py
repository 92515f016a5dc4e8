"""The parts of a step at the sizes of Llama-3-8B, counted on the meta device, and the time that they should take.

What is counted is the product's own code; kernels that are not here, of attention and of fused operators, are stood for
by operators of the same inputs and outputs. ``python -m benchmarks.step bytes`` prints the table.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.counting import Counting, Counts
from fft.console import format_table

#: Tokens of a micro-batch, and the model's sizes.
TOKENS, VOCABULARY, HIDDEN = 8192, 128_256, 4096
_MODEL = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "intermediate_size": 14_336, "num_hidden_layers": 32}
_MODEL |= {"num_attention_heads": 32, "num_key_value_heads": 8}


@dataclass(frozen=True)
class Rates:
    """What a device is taken to reach: products in multiply-adds x 2 a second, bytes a second."""

    name: str
    flops: float
    bandwidth: float


#: Assumptions, not measurements: what well-tuned products and elementwise kernels are reported to reach of the
#: datasheets' 989, 312 and 376 TFLOP/s and 3.35, 2.04 and 1.6 TB/s.
DEVICES = (Rates("H100", 680e12, 2.85e12), Rates("A100", 250e12, 1.7e12), Rates("910B", 290e12, 1.2e12))


@dataclass(frozen=True)
class Part:
    """A part of a step: what was counted, the multiply-adds x 2 of its products, and bytes of the sums they add to."""

    name: str
    counts: Counts
    flops: float = 0.0
    summed: int = 0

    @property
    def bytes(self) -> int:
        """What is moved besides products' operands."""
        return self.counts.bytes + self.summed

    def milliseconds(self, rates: Rates) -> float:
        """At a device's rates, one after the other."""
        return 1e3 * (self.flops / rates.flops + self.bytes / rates.bandwidth)


@torch.library.custom_op("bench::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("bench::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@torch.library.custom_op("bench::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@torch.library.custom_op("bench::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("bench::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _differentiable() -> None:
    """Give the stand-ins their gradients, as fused kernels have them: one launch each."""

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors, *(output[1:] if isinstance(output, tuple) else ()))

    def norm(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return *torch.ops.bench.rms_norm_backward(grad, x, weight, scale), None

    def turn(ctx: Any, *grads: Tensor) -> tuple:
        return *torch.ops.bench.rotary(*grads, *ctx.turns), None, None

    def keep_turns(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.turns = inputs[2:]

    def swiglu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.bench.swiglu_backward(grad, *ctx.saved_tensors)

    _rms_norm.register_autograd(norm, setup_context=keep)
    _rotary.register_autograd(turn, setup_context=keep_turns)
    _swiglu.register_autograd(swiglu, setup_context=keep)


_differentiable()


def layer(fused: bool, selective: bool = False, tokens: int = TOKENS) -> list[Part]:
    """A decoder layer's forward and backward, by transformers' operators or with one launch for each that is fused."""
    from transformers import AutoConfig

    from fft.models.recompute import selective as recompute
    from fft.models.spec import ModelSpec, copy_of
    from fft.ops.fused import FusedOps
    from fft.planning.activations import _documents, _layer
    from fft.planning.costs import planned_layers
    from fft.planning.tower_activations import turns_of

    operators = FusedOps("stand-ins", lambda *given: _rms_norm(*given)[0], _rotary, _swiglu)
    spec = ModelSpec(AutoConfig.for_model("llama", **_MODEL), torch.bfloat16, fused=operators if fused else None)
    ((path, module),) = planned_layers(spec)[1].modules.items()
    module = copy_of(module)
    with torch.device("meta"):
        hidden = torch.empty(1, tokens, spec.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.empty(1, tokens, dtype=torch.int64)
        given = {"position_ids": positions, "documents": _documents(tokens, 1)}
    given["position_embeddings"] = turns_of(spec, path, tokens, torch.bfloat16)
    run = partial(_layer, module, None, **given)
    with Counting() as counting:
        with counting.part("forward"):
            output = (recompute(run, hidden) if selective else run(hidden))[0]
        with counting.part("backward"):
            output.backward(torch.empty_like(output))
    forward = 2.0 * tokens * sum(p.numel() for p in module.parameters() if p.ndim > 1)
    words = f"layer, {'fused' if fused else 'plain'} operators{', recomputed selectively' if selective else ''}"
    return [
        Part(f"{words}: forward", counting.parts["forward"], forward),
        Part(f"{words}: backward", counting.parts["backward"], 2 * forward),
    ]


def kept_by_layer(compiled: bool, selective: bool = False, tokens: int = TOKENS) -> int:
    """Bytes that a decoder layer keeps from forward to backward, parameters left out; of two documents."""
    from transformers import AutoConfig

    from fft.models.recompute import selective as recompute
    from fft.models.spec import ModelSpec, copy_of
    from fft.ops.documents import Documents
    from fft.planning.costs import planned_layers
    from fft.planning.tower_activations import turns_of

    spec = ModelSpec(AutoConfig.for_model("llama", **_MODEL), torch.bfloat16)
    ((path, module),) = planned_layers(spec)[1].modules.items()
    module = copy_of(module)
    documents, turns = Documents.of((0, tokens // 2, tokens), "meta"), turns_of(spec, path, tokens, torch.bfloat16)
    with torch.device("meta"):
        hidden = torch.empty(1, tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.empty(1, tokens, dtype=torch.int64)
    given = {"attention_mask": None, "position_ids": positions, "position_embeddings": turns}
    seen = documents.boundaries if compiled else documents

    def run(states: Tensor) -> Tensor:
        return recompute(once, states) if selective else once(states)

    def once(states: Tensor) -> Tensor:
        return module(states, documents=seen, **given)

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()  # which lives, so that its number is its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(hidden)
    parameters = {id(p.untyped_storage()) for p in module.parameters()}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in parameters)


def loss(fused: bool, cap: float | None = None, tokens: int = TOKENS, shards: int = 1) -> tuple[Part, int]:
    """The head and the loss, forward and backward, and the pieces that it has. ``shards`` share the vocabulary out."""
    from fft.ops import cross_entropy
    from fft.ops.logits import FusedLogits, PlainLogits
    from fft.parallel.tensor_plan import Shard

    class Silent:
        """Other ranks, whom nobody waits for."""

        size = shards

        def all_reduce(self, x: Tensor, *_: object) -> Tensor:
            return x

    rows = VOCABULARY // shards
    with torch.device("meta"):
        hidden = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(rows, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        targets = cross_entropy.Targets(*(torch.empty(tokens, dtype=torch.int64) for _ in "pi"))
        head = cross_entropy.HeadSum(torch.empty(rows, HIDDEN), empty=False, factor=0.5)
    shard = Shard((VOCABULARY, HIDDEN), 0, ((0, rows),)) if shards > 1 else None
    made = cross_entropy.Vocabulary(shard, Silent() if shards > 1 else None, cap)
    with _replaced(cross_entropy, "choose_logits", lambda *_: FusedLogits if fused else PlainLogits):
        cross_entropy._widens(weight.device, weight.dtype)
        with Counting() as counting:
            cross_entropy.linear_cross_entropy(hidden, weight, targets, made, head=head).backward()
    each = cross_entropy.logit_bytes(2, fused, cap is not None)
    pieces = -(-tokens // cross_entropy.piece_rows(rows, each))
    name = f"loss, {'kernel' if fused else 'operators'}{', capped' if cap else ''}, {pieces} pieces"
    name += f", one of {shards} shards" if shards > 1 else ""
    # The sum is read and written for each piece, in fp32.
    return Part(name, counting.counts, 6.0 * tokens * rows * HIDDEN, 8 * pieces * rows * HIDDEN), pieces


def logit_bytes(part: Part, rows: int) -> float:
    """Bytes that the loss moves for each of ``TOKENS`` x ``rows`` logits, those of its products' operands included."""
    pieces = [x for x in part.counts.launches if x.elements > TOKENS * HIDDEN and not x.product]
    return sum(x.bytes for x in pieces) / (TOKENS * rows) + 3 * 2  # a product writes them, two read their gradients


def gradient_sums(embedding: bool) -> Part:
    """A gradient of the head's size on its way to its sum; or an embedding's rows, which are added themselves."""
    from torch import nn

    from fft.training.sums import Bf16Sums, _Lookup

    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16))
        total, ids = torch.empty(VOCABULARY * HIDDEN), torch.empty(1, TOKENS, dtype=torch.int32)

    class Optimizer:
        bf16_groups, fp32_groups_gradients, fp32_groups_has_gradients = [[weight]], [[total]], [[False]]
        get_grads_for_norm = None

    optimizer = Optimizer()
    sums = Bf16Sums(optimizer)
    if embedding:
        hidden = _Lookup.apply(weight, ids, None, sums)
        with Counting() as counting:
            hidden.backward(torch.empty_like(hidden))
        return Part("embedding: backward and sum", counting.counts)
    weight.grad = torch.empty_like(weight)
    with Counting() as counting:
        optimizer._update_hp_grad(weight, 0, 0, clear_lp_grads=False)
    return Part("gradient sum of the embedding's size", counting.counts)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def instructions(step: Callable[[], object], engine: Any) -> tuple[dict[str, Counts], int]:
    """What a step runs and reads in each kind of instruction of the schedule, and outside; and a rank's parameters."""
    owner = engine.deepspeed
    with Counting() as counting:

        def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def run(*given: Any, **options: Any) -> Any:
                with counting.part(name):
                    return function(*given, **options)

            return run

        table = {kind: watched(function, kind.__name__) for kind, function in owner._INSTRUCTION_MAP.items()}
        with _replaced(owner, "_INSTRUCTION_MAP", table):
            step()
    return counting.parts, sum(p.numel() for p in engine.parameters.values())


def run_counts() -> list[dict]:
    """Of every rank of a launcher, a stage: its parameters, and launches, bytes and reads of each kind of instruction.

    In bf16, everything recomputed in backward, in the third step of a small run of two micro-batches of two documents.
    """
    from benchmarks.engines import Workload, llama

    stages = int(os.environ.get("WORLD_SIZE", "1"))
    flags = ("--dtype=bf16", "--checkpoint_grad_interval=1", f"--pipe_parallel_size={stages}")
    workload = Workload(llama(64, 4, 512), 64, 2, document=32, flags=flags)
    step, engine = workload.build()
    for _ in range(2):
        step()
    parts, parameters = instructions(step, engine)
    own = {name: {"launches": len(c.launches), "bytes": c.bytes, "reads": dict(c.reads)} for name, c in parts.items()}
    told: list[Any] = [None] * stages
    dist.all_gather_object(told, {"parts": own, "parameters": parameters})
    return told


def instructions_table(told: list[dict]) -> str:
    """What :func:`run_counts` tells."""
    heads = ("a step of a small run, instruction", "stage", "launches", "bytes a parameter", "reads")
    rows = []
    for name in told[0]["parts"]:
        for stage, own in enumerate(told):
            if part := own["parts"].get(name):
                reads = ", ".join(f"{count} {kind}" for kind, count in part["reads"].items())
                rows.append([name, stage, part["launches"], part["bytes"] / own["parameters"], reads or "none"])
    return format_table(heads, rows)


def all_parts() -> list[Part]:
    """What the table has a line for."""
    return [
        *layer(fused=False),
        *layer(fused=True),
        *layer(fused=True, selective=True),
        loss(fused=False)[0],
        loss(fused=True)[0],
        loss(fused=True, cap=30.0)[0],
        loss(fused=True, shards=8)[0],
        gradient_sums(embedding=False),
        gradient_sums(embedding=True),
    ]


def table(parts: Sequence[Part]) -> str:
    """Launches, bytes, host reads and predicted milliseconds of each part."""
    heads = ("a micro-batch", "launches", "products", "GB besides", "reads", *(f"{d.name} ms" for d in DEVICES))
    rows = [
        [
            part.name,
            len(part.counts.launches),
            part.counts.products,
            part.bytes / 1e9,
            part.counts.reads.total(),
            *(part.milliseconds(device) for device in DEVICES),
        ]
        for part in parts
    ]
    return format_table(heads, rows)
