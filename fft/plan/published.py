"""Rows of published measurements as runs: what a table says, and what is known of the software that it came from."""

import re
from dataclasses import replace

from fft.plan.hardware import HARDWARE, Machine, read_machine
from fft.plan.run import EVERYTHING, NOTHING, Again, PlannedRun, Sides
from fft.plan.shape import Shape, Sizes, decoder
from fft.plan.stack import Stack

_MEGATRON = Stack(attention="unfused", logits=40.0, reduced=2.0, zero=0, dropout=True, step=40.0, passes=1.0)
_MODERN = replace(_MEGATRON, attention="flash", dropout=False, zero=1, reduced=4.0, overlapped=True)

#: What ran, by source: see docs/planner.md for where each fact is from.
STACKS = {
    # FSDP of PyTorch 1.13 to 2.1, a triton or first FlashAttention, LayerNorm in 16 bits, products as they come.
    "mosaic": Stack(flash=0.62, zero=3, overlapped=True),
    # FSDP2, eager operators of PyTorch, SDPA.
    "titan": Stack(zero=3, reduced=4.0, overlapped=True, fused_norms=False, fused_inner=False),
    "mega21": _MEGATRON,
    "mega22": _MEGATRON,
    "mcoreH100": replace(_MODERN, split_norms=True, tensor_hidden=0.5),
    "vtrainM": _MEGATRON,
    "vtrainS": _MEGATRON,
    "alephalpha": Stack(zero=1, logits=40.0, fused_inner=False, blocking=True),
    "nanotron": Stack(zero=1, reduced=4.0, blocking=True, logits=40.0),
    "ascend": replace(_MODERN, overlapped=False, zero=0),
    "bloom": replace(_MEGATRON, zero=1, reduced=4.0, dropout=False, scores=(4.0, 6.0)),
    "mbridge": replace(_MODERN, split_norms=True, tensor_hidden=0.5),
    "nemo": replace(_MODERN, split_norms=True),
    "nemoA100": replace(_MODERN, split_norms=True),
    "llama3": replace(_MODERN, split_norms=True, tensor_hidden=0.5),
    "a800gist": Stack(zero=3, overlapped=True, fused_norms=False, fused_inner=False),
    "msswift": replace(_MODERN, split_norms=True),
    "tinyllama": Stack(zero=3, overlapped=True),
    "llmq": Stack(zero=1, step=24.0, host=0.2),
    "colossal": Stack(zero=2, overlapped=True),
    "v100": replace(_MEGATRON, zero=1),
    "dsv3": _MODERN,
}

#: Experts, those of a token, their width, width of a head. DeepSeek's shared expert counts as one more of a token.
_MIXTURES = (
    ("GPT-OSS-120B", 128, 4, 2880, 64),
    ("Qwen3-235B", 128, 8, 1536, 128),
    ("DeepSeek-V3", 256, 9, 2048, 128),
    ("Mixtral", 8, 2, 14336, 128),
)

_FILES = (
    ("A100", 40, "8xa100-40g-sxm"),
    ("A100", 80, "8xa100-80g-sxm"),
    ("A800", 80, "8xa100-80g-sxm"),
    ("H100", 80, "8xh100-80g-sxm"),
    ("H100", 96, "8xh100-96g-500w"),
    ("H800", 80, "8xh100-80g-sxm"),
    ("H200", 141, "8xh200-141g-sxm"),
    ("B200", 180, "8xb200-180g-sxm"),
    ("B300", 288, "8xb300-288g-sxm"),
    ("GB200", 192, "72xgb200-192g"),
    ("GB300", 288, "72xgb300-288g"),
    ("RTX4090", 24, "8x4090-24g"),
    ("Ascend910B", 64, "8x910b-64g"),
    ("V100", 32, "4xv100-32g"),
    ("A100-PCIE", 40, "8xa100-40g-pcie"),
)


def source_of(row: dict[str, str]) -> str:
    """The study that a row is of: its id without the number."""
    return row["id"].rpartition("-")[0]


def machine_of(row: dict[str, str]) -> Machine:
    """The machine that a row names; its links as the row has them, where it does."""
    memory = float(row["device_mem_gb"] or 80)
    name = min((f for f in _FILES if f[0] == row["device"]), key=lambda f: abs(f[1] - memory))[2]
    machine = read_machine(HARDWARE / f"{name}.yaml")
    node = int(row["gpus_per_node"] or machine.node)
    if name.startswith("72x"):
        node = 72
    machine = replace(machine, node=node)
    if (speed := _node_speed(row["inter_link"], node)) is not None:
        machine = replace(machine, between=replace(machine.between, bandwidth=speed))
    return machine


def _node_speed(said: str, node: int) -> float | None:
    """B/s of a node from words like "RoCE 1600 Gb/s per node", "8x HDR IB 200 Gb/s per node", "400 Gb/s per GPU"."""
    if "Omni-Path" in said:
        count = re.match(r"(\d+)x", said)
        return 12.5e9 * int(count[1]) if count else None
    speed = re.search(r"([\d.]+) ?Gb/s", said)
    if speed is None:
        return None
    times = re.match(r"(\d+)x", said)
    each = float(speed[1]) / 8 * 1e9
    return each * (int(times[1]) if times else node if "per GPU" in said else 1)


def shape_of(row: dict[str, str]) -> Shape:
    """A row's model."""
    number = {k: int(float(row[k])) for k in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    gated, tied = row["gated_mlp"] == "1", row["tied"] == "1"
    head = number["hidden"] // number["heads"]
    sizes = Sizes(number["hidden"], number["heads"], number["kv_heads"], head, number["ffn"], gated)
    sizes = _with_experts(sizes, row["model"])
    layers = (decoder(sizes),) * number["layers"]
    positions = 0 if gated else int(row["seq"])
    return Shape(
        row["model"],
        number["hidden"],
        sizes.heads,
        sizes.kv_heads,
        sizes.head_size,
        number["vocab"],
        tied,
        layers,
        positions,
    )


def _with_experts(sizes: Sizes, model: str) -> Sizes:
    """What the table does not say of mixtures, from their model cards."""
    for name, experts, used, ffn, head in _MIXTURES:
        if name in model:
            return replace(sizes, experts=experts, used=used, expert_ffn=ffn, head_size=head)
    return sizes


def again_of(row: dict[str, str], stack: Stack) -> Again:
    """What backward computes again."""
    said = row["recompute"]
    if said.startswith("full"):
        return EVERYTHING
    if "2nd layer" in said:
        return Again(0.5, 0.5, 0.5, 0.5)
    if said.startswith("selective"):
        if stack.attention == "unfused":
            return Again(attention=1.0)
        return Again(products=0.5 if source_of(row) == "titan" else 0.0, others=1.0)
    return NOTHING


def _stack_of(row: dict[str, str]) -> Stack:
    source, notes = source_of(row), row["notes"]
    stack = STACKS.get(source) or STACKS.get(re.sub(r"\d+$", "", source)) or Stack()
    if source == "mosaic":
        stack = replace(stack, reduced=2.0 if "precision PURE" in notes else 4.0)
        if "ZeRO-2" in row["fsdp_or_zero"] or "SHARD_GRAD_OP" in row["fsdp_or_zero"]:
            stack = replace(stack, zero=2)
    if source == "mega22":
        stack = replace(stack, split_norms="with sequence parallel" in notes)
    if source == "alephalpha":
        kernel, shared = row["attention_kernel"], bool(re.search(r"sequence parallel (1|on)", notes))
        stack = replace(
            stack,
            attention="unfused" if kernel == "torch" else "flash",
            flash=0.62 if "v1" in kernel else 1.0,
            scores=(27.0, 40.0),
            fused_norms="RMS kernel" in notes,
            split_norms=shared,
            tensor_back=1.0 if shared else 1.5,
        )
    if source == "ascend":
        hidden = 0.5 if "MC2" in notes else 0.0
        stack = replace(
            stack,
            tensor_hidden=hidden,
            overlapped="overlap-grad-reduce" in notes,
            split_norms=int(row["tp"] or 1) > 1,
            attention="unfused" if "no flash" in notes else "flash",
        )
    if row["dtype"] in ("float8", "fp8"):
        stack = replace(stack, rate=1.6)
    if "torch.compile" in notes or "+ compile" in notes:
        stack = replace(stack, fused_norms=True, fused_inner=True)
    if row["fsdp_or_zero"].startswith(("ZeRO-3", "FSDP full", "FSDP2")):
        stack = replace(stack, zero=3)
    elif row["fsdp_or_zero"].startswith("ZeRO-2"):
        stack = replace(stack, zero=2)
    return stack


def run_of(row: dict[str, str]) -> PlannedRun | None:
    """The run of a row; None where it has no layout, or no batch."""
    if not row["dp"] or not row["global_batch_samples"]:
        return None
    stack = _stack_of(row)
    dp, pp = int(row["dp"]), int(row["pp"])
    samples = int(row["global_batch_samples"])
    micro = int(row["micro_batch"] or 1)
    sides = Sides(
        data=dp,
        pipe=pp,
        sequence=int(row["cp"] or 1),
        tensor=int(row["tp"]),
        expert=int(row["ep"] or 1),
        chunks=int(row["virtual_pp"] or 1) if pp > 1 else 1,
    )
    return PlannedRun(
        machine_of(row),
        shape_of(row),
        sides,
        stack,
        int(row["seq"]),
        micro,
        max(1, round(samples / dp / micro)),
        again_of(row, stack),
    )
