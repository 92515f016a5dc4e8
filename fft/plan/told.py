"""Plans as text: a table of the best, where the time of each goes, flags to paste, a settings file."""

from collections.abc import Sequence

from fft.console import format_table
from fft.plan.ours import Job, choice_flags
from fft.plan.search import FILLED, LayoutPlan, Search
from fft.planning.costs import layer_costs, multiply_adds
from fft.train_arguments import TrainArguments

_DAY = 86_400.0


def flops_of(job: Job) -> float:
    """Of a token's forward and backward: attention as it is, causal, nothing that is computed again."""
    return 2.0 * sum(map(sum, multiply_adds(layer_costs(job.spec, job.seq))))


def layout_name(plan: LayoutPlan) -> str:
    """Sizes of more than one: ``data 4 x pipe 16``."""
    choice = plan.choice
    ring = choice.sequence // choice.ulysses
    sizes = (("data", choice.data), ("pipe", choice.pipe), ("ring", ring), ("ulysses", choice.ulysses))
    sizes = (*sizes, ("tensor", choice.tensor), ("experts", choice.expert))
    return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one device"


def _variant(plan: LayoutPlan) -> str:
    choice = plan.choice
    again = f"every {choice.recompute}" if isinstance(choice.recompute, int) else choice.recompute
    return again + (", halves" if choice.split else "") + (", offload" if choice.offload else "")


def best_table(search: Search, plans: Sequence[LayoutPlan], train_tokens: float) -> str:
    """The plans, the fastest first."""
    job, machine = search.job, search.machine
    flops, limit = flops_of(job), FILLED * machine.device.memory
    heads = ["", "layout", "micro x acc.", "recompute", "tokens/s", "s/step", "MFU %", "GB", "bubble %", "longest row"]
    heads += ["days"] if train_tokens else []
    rows = []
    for number, plan in enumerate(plans, 1):
        told = plan.prediction
        row: list[object] = [
            number,
            layout_name(plan),
            f"{plan.choice.micro} x {plan.choice.accumulated}",
            _variant(plan),
        ]
        row += [round(told.rate), told.seconds, 100 * flops * told.rate / search.ranks / machine.device.peak]
        row += [plan.fullest / 1e9, 100 * told.bubble / told.seconds]
        row.append(search.memory.longest(plan.choice, plan.bounds, limit))
        row += [train_tokens / told.rate / _DAY] if train_tokens else []
        rows.append(row)
    return format_table(heads, rows)


def time_table(plans: Sequence[LayoutPlan]) -> str:
    """Percent of a step, of the mean device; what is hidden is besides."""
    heads = ["", "products", "attention", "other kernels", "host", "bubble", "p2p", "tensor", "sequence", "experts"]
    heads += ["gradients", "optimizer", "hidden"]
    rows = []
    for number, plan in enumerate(plans, 1):
        told, parts = plan.prediction, plan.prediction.parts
        seconds = (parts.products, parts.attention, parts.others, parts.waiting, told.bubble, told.sends, parts.tensor)
        seconds = (*seconds, parts.sequence, parts.experts, told.gradients, told.optimizer, parts.hidden)
        rows.append([number, *(100 * x / told.seconds for x in seconds)])
    return format_table(heads, rows)


def flags_text(job: Job, plan: LayoutPlan) -> str:
    """Flags that differ from their defaults, to paste."""
    defaults = TrainArguments(model="")
    flags = [f"--seq_len {job.seq}"]
    for name, value in choice_flags(plan.choice, plan.bounds).items():
        if value is True:
            flags.append(f"--{name}")
        elif value != getattr(defaults, name):
            flags.append(f"--{name} {value}")
    return " ".join(flags)


def settings_text(search: Search, plan: LayoutPlan) -> str:
    """The same as a file for ``--config``, with what is predicted."""
    job, told = search.job, plan.prediction
    memory = f"{search.machine.device.memory / 1e9:g}"
    lines = [
        f"# {job.name} on {search.ranks} x {search.machine.device.name}: {layout_name(plan)}.",
        f"# Predicted by fft.plan: {told.rate:,.0f} tokens/s, {plan.fullest / 1e9:.1f} GB, "
        f"{told.seconds:.2f} s a step of {job.step_tokens:,} tokens.",
        f"model: {job.args.model}",
        f"ranks: {search.ranks}",
        f"device_memory: {memory}",
        f"seq_len: {job.seq}",
        "dtype: bf16",
    ]
    defaults = TrainArguments(model="")
    for name, value in choice_flags(plan.choice, plan.bounds).items():
        if value != getattr(defaults, name):
            shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
            lines.append(f"{name}: {shown}")
    return "\n".join(lines) + "\n"
