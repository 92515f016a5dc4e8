"""The settings of ``conf/`` beside what the planner would choose: ``python -m benchmarks.plan_conf [NAME ...]``."""

import sys
from dataclasses import replace
from pathlib import Path

from fft.arguments import parse_arguments
from fft.plan.choice import LayoutChoice
from fft.plan.hardware import HARDWARE, read_machine
from fft.plan.ours import read_job
from fft.plan.search import Search
from fft.plan.step import predict
from fft.plan.told import flags_text, layout_name
from fft.planning.dry_run import planned

CONF = Path("conf")
MACHINES = {"a100-40g": "8xa100-40g-pcie", "h100-80g": "8xh100-80g-sxm", "910b-64g": "8x910b-64g"}


def beside(path: Path) -> str:
    """A setting's predicted rate, and the planner's best for as many ranks and tokens a step."""
    machine = read_machine(HARDWARE / f"{MACHINES[path.stem.partition('-')[2]]}.yaml")
    args = parse_arguments(["--config", str(path), "--dry_run"])
    layout, _ = planned(args, args.ranks)
    mesh = layout.mesh
    micro, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    recompute = "selective" if args.checkpoint_grad_selective else args.checkpoint_grad_interval or "none"
    sizes = mesh.data, mesh.pipe, mesh.sequence, args.ulysses_degree, mesh.tensor, mesh.expert
    choice = LayoutChoice(*sizes, micro, accumulated, recompute, args.split_dlayer, args.offload_optimizer)
    step_tokens = mesh.data * micro * accumulated * args.seq_len
    job = read_job(args.model, args.seq_len, step_tokens)
    search = Search(job, machine, mesh.world)
    last = len(search.shape(args.split_dlayer).layers) + 1
    run = replace(search.run(choice), bounds=tuple(min(bound, last + 1) for bound in layout.bounds))
    own, fullest = predict(run), max(stage.total for stage in layout.memory)
    best = next(plan for plan in search.best(40) if _like(plan.choice))
    gain = best.prediction.rate / own.rate - 1
    return (
        f"{path.name}: {own.rate:,.0f} tokens/s, {fullest / 1e9:.1f} GB; best {best.prediction.rate:,.0f} "
        f"({100 * gain:+.1f} %), {best.fullest / 1e9:.1f} GB, {layout_name(best)}: {flags_text(job, best)}"
    )


def _like(choice: LayoutChoice) -> bool:
    """Whether a choice may be a setting of conf/: stages, one row a micro-batch, the optimizer on the device."""
    return choice.pipe > 1 and choice.micro == 1 and not choice.offload


def main() -> None:
    """One line a setting."""
    names = sys.argv[1:] or [path.stem for path in sorted(CONF.glob("*-*g.yaml")) if "vl" not in path.stem]
    for name in names:
        print(beside(CONF / f"{name}.yaml"), flush=True)


if __name__ == "__main__":
    main()
