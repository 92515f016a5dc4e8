"""What a run says at its end: how well it went, where its best is, a picture of its losses, and what to do next."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fft.arguments import TrainArguments
from fft.chart import losses
from fft.checkpoint.card import CARD, card_of, perplexity, told_loss
from fft.checkpoint.folder import METRICS, PICTURE, checkpoint_tag
from fft.checkpoint.run import RunFolder
from fft.console import duration
from fft.errors import UserError, one_line
from fft.planning.preflight import Plan
from fft.training.evaluation import Evaluated
from fft.training.metric_sinks import by_dataset_in, loss_name, named_in, read_numbers
from fft.training.metrics import Metrics, Progress, told_pairs


def told_evaluation(plan: Plan, batch: int, step: int, found: Evaluated, name: str = "") -> str:
    """The line of an evaluation, which may have a ``name``, after ``step`` steps of ``batch`` samples; one more where
    it has several datasets.
    """
    loss, count, measures, datasets = found
    epoch = f"  epoch {step * batch / plan.train.samples_per_epoch:.2f}" if plan.train is not None else ""
    of = f" of {name}" if name else ""
    line = f"step {step}/{plan.total_steps}  validation loss{of} {loss:.4f} over {count:,}"
    if measures:
        line += f" pairs  {told_pairs(measures)}{epoch}"
    else:
        line += f" tokens  perplexity {perplexity(loss):.4g}{epoch}"
    if datasets:
        told = (f"{dataset} {loss:.4f} over {held:,}" for dataset, (loss, held) in datasets.items())
        line += f"\nstep {step}/{plan.total_steps}  validation loss{of} by dataset: {', '.join(told)}"
    return line


def conclude(
    args: TrainArguments, plan: Plan, state: dict[str, Any], metrics: Metrics, runs: Sequence[RunFolder], ended: bool
) -> None:
    """Tell what came of a run that has ``ended`` well, or was stopped; hand pictures and models to servers.

    One rank calls it. ``state`` is what a checkpoint of the end would say.
    """
    progress = metrics.progress
    metrics.sinks.text(CARD, card_of(state, plan.config.model_type))
    if plan.total_steps and progress.loss is not None:
        for line in _summary(state, progress, runs):
            metrics.log(line)
        if runs and (picture := _picture(runs[0].notes)):
            metrics.sinks.text(PICTURE, picture)
            _keep(runs, picture, metrics)
    if not ended:
        metrics.sinks.stopped()
        return
    if args.register_model and args.output_dir:
        metrics.sinks.register(args.register_model, args.output_dir)
    if plan.total_steps and (commands := _next(args, plan)):
        metrics.log("\n".join(["next:", *(f"  {command}" for command in commands)]))


def _summary(state: dict[str, Any], progress: Progress, runs: Sequence[RunFolder]) -> Iterator[str]:
    step, args = state["step"], state["arguments"]
    tokens = step * state["global_batch"] * args["seq_len"]
    speed = ""
    if progress.seconds:
        rate = progress.tokens / progress.seconds
        speed = f" in {duration(progress.seconds)} of steps ({rate:,.0f} tokens/s in the mean)"
    most = "at most " if args["ragged"] else ""
    yield f"{step:,} steps, {most}{tokens:,} tokens{speed}; last training loss {progress.loss:.4f}"
    if progress.last is None or progress.best is None:
        return
    kept = set(runs[0].steps()) if runs else set()
    found = []
    for name, (at, loss) in (("lowest", progress.best), ("last", progress.last)):
        where = f", {runs[0].shown(checkpoint_tag(at))}" if at in kept else ""
        found.append(f"{name} {told_loss(args, loss)} at step {at:,}{where}")
    yield f"validation loss: {'; '.join(found)}"
    if progress.named:
        told = (f"{name} {told_loss(args, loss)}" for name, loss in progress.named.items())
        yield f"last, by table: {'; '.join(told)}"
    for table, own in by_dataset_in(progress.by_dataset).items():
        told = (f"{name} {told_loss(args, progress.by_dataset[number])}" for name, number in own.items())
        yield f"last{table and f' of {table}'}, by dataset: {'; '.join(told)}"


def _picture(notes: Path) -> str:
    """Losses by step, as a file of its own; empty where there are none."""
    numbers, _ = read_numbers(notes)
    names = named_in(numbers)
    points = {
        name: sorted((step, value) for step, value in numbers.get(name, {}).items() if math.isfinite(value))
        for name in ("loss", "eval_loss", *map(loss_name, names))
    }
    others = {name: points[loss_name(name)] for name in names[1:]}  # the first is that of the validation's line
    return losses(points["loss"], points["eval_loss"], others)


def _keep(runs: Sequence[RunFolder], picture: str, metrics: Metrics) -> None:
    try:
        for run in runs:
            run.put(PICTURE, picture)
    except (OSError, UserError) as error:  # a picture is not worth a run
        metrics.log(f"warning: {PICTURE} could not be written ({one_line(error)})")
    else:
        metrics.log(f"losses by step: {runs[0].shown(PICTURE)}, numbers: {runs[0].shown(METRICS)}")


def _next(args: TrainArguments, plan: Plan) -> list[str]:
    """Commands that go on from what was written."""
    base = args.from_ckpt or args.model
    if args.output_dir and args.lora_dim:
        merge = f"python -m fft.checkpoint.convert {base} MERGED --lora {args.output_dir}  # one model of both"
        serve = f"python -m fft.serve.server --model {base} --lora mine={args.output_dir}  # or serve them"
        return [merge] if args.use_dora else [merge, serve]  # vLLM has no DoRA
    if args.output_dir and plan.tokenizer is not None:
        return [f"python -m fft.serve.server --model {args.output_dir}"]
    if args.checkpoint and args.save_steps:
        return [f"python -m fft.checkpoint.convert {args.checkpoint} MODEL  # the newest checkpoint as a model"]
    return []
