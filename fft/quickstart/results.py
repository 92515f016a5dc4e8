"""What the quickstart shows at the end: a picture of the losses and a page of numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fft.files import atomic_file
from fft.quickstart.places import Place

#: Steps over which the last training loss is averaged: single steps differ by more than training gains in ten.
_LAST = 10


@dataclass(frozen=True)
class Losses:
    """A run's losses in nats a token: (step, loss) pairs in order, and the training's mean rate in tokens/s."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    tokens_per_second: float

    @property
    def last_train(self) -> float:
        """Mean of the last ten steps."""
        tail = [loss for _, loss in self.train[-_LAST:]]
        return sum(tail) / len(tail)

    @property
    def rate(self) -> str:
        """How many steps there were, and how fast."""
        return f"{len(self.train):,} steps, {self.tokens_per_second:,.0f} tokens/s"

    @property
    def course(self) -> str:
        """The same, and where the training's loss went."""
        return f"{self.rate}, loss {self.train[0][1]:.3f} to {self.last_train:.3f}"


def read_metrics(path: Path) -> Losses:
    """Read the ``metrics.jsonl`` of a run folder."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    # Every logged rate is the mean of the steps since the one before, so time is what adds up.
    logged = [(r["step"], r["tokens_per_second"]) for r in records if "tokens_per_second" in r]
    steps = [b - a for a, b in zip([0, *(step for step, _ in logged)], (step for step, _ in logged), strict=False)]
    seconds = sum(n / rate for n, (_, rate) in zip(steps, logged, strict=True))
    return Losses(train, validation, sum(steps) / seconds)


def plot_losses(losses: Losses, baseline: float, output: Path) -> None:
    """Save a PNG of training and validation loss by step, with the unigram baseline as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*losses.train, strict=True), color="#9ab8d8", linewidth=1, label="training")
    axes.plot(*zip(*losses.validation, strict=True), color="#17528a", marker="o", label="validation")
    axes.axhline(baseline, color="#b03a2e", linestyle="--", linewidth=1.2, label=f"unigram baseline {baseline:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=f"Validation loss {losses.validation[-1][1]:.2f}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(output) as aside, open(aside, "wb") as stream:
        FigureCanvasAgg(figure).print_png(stream)


def summary(
    tables: Mapping[str, int],
    stages: Sequence[tuple[str, float, str]],
    losses: Losses,
    baseline: float,
    completions: Sequence[tuple[str, str]],
    folders: Mapping[str, Place],
) -> str:
    """The closing page.

    ``tables`` maps a table's name to its tokens, ``stages`` are (name, seconds, what was done at which rate),
    ``completions`` are (prompt, text), ``folders`` maps a result's name to where it lies.
    """
    first, last = losses.validation[0][1], losses.validation[-1][1]
    lines = [*stage_lines(stages), "", "tokens in the table"]
    lines += [f"  {name:<11}  {tokens:>12,}" for name, tokens in tables.items()]
    lines += ["", "loss, nats/token   first    last"]
    lines += [f"  {'training':<13}  {losses.train[0][1]:>7.3f} {losses.last_train:>7.3f}"]
    lines += [f"  {'validation':<13}  {first:>7.3f} {last:>7.3f}"]
    lines += [f"  {'unigram model':<13}  {'':>7} {baseline:>7.3f}   beaten by {baseline - last:.3f}", ""]
    for prompt, text in completions:
        lines += ["generated: prompt|continuation", _boxed(f"{prompt}|{text}"), ""]
    lines += [f"{name}: {path}" for name, path in folders.items()]
    return "\n".join(lines)


def stage_lines(stages: Sequence[tuple[str, float, str]]) -> list[str]:
    """Stages as (name, seconds, what was done at which rate), and their seconds in all."""
    lines = ["stage            seconds  work"]
    lines += [f"{name:<15}  {seconds:>7.1f}  {work}".rstrip() for name, seconds, work in stages]
    return [*lines, f"{'all':<15}  {sum(seconds for _, seconds, _ in stages):>7.1f}"]


def _boxed(text: str) -> str:
    """Every line, blank ones too, behind a bar."""
    return "\n".join(f"  | {line}".rstrip() for line in text.split("\n"))
