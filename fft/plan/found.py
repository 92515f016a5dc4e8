"""The planner from Python: what ``python -m fft.plan`` prints, as an object that a notebook shows."""

from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path

from fft.chart import Picture
from fft.errors import UserError
from fft.plan.hardware import Machine, read_machine
from fft.plan.ours import Job, read_job
from fft.plan.search import LayoutPlan, Search
from fft.plan.timeline import timeline_svg
from fft.plan.told import best_table, flags_text, layout_name, settings_text, time_table
from fft.planning.layout import told_count


@dataclass(frozen=True)
class FoundLayouts:
    """The fastest layouts of a model on a machine, the fastest first, as :func:`find_layouts` finds them.

    ``train_tokens`` are those for which days are told, 0 for none.
    """

    job: Job
    machine: Machine
    search: Search
    plans: tuple[LayoutPlan, ...]
    train_tokens: float = 0.0

    def __str__(self) -> str:
        ranks, device = self.search.ranks, self.machine.device.name
        return "\n".join(
            [
                f"{self.job.name}, {told_count(self.search.shape(False).parameters)} parameters, {ranks} x {device}",
                f"{self.search.seen:,} layouts, {self.search.tried:,} of them played through\n",
                best_table(self.search, self.plans, self.train_tokens),
                f"\nwhere the time goes, %\n{time_table(self.plans)}",
                f"\nthe first: {self.flags()}",
            ]
        )

    def _repr_html_(self) -> str:
        # Notebooks have styles of their own for what is in a cell's output, which break lines and columns.
        style = "overflow-x: auto; white-space: pre; word-break: normal; font-family: monospace; line-height: 1.3"
        return f'<pre style="{style}">{escape(str(self))}</pre>'

    def plot(self, number: int = 0) -> Picture:
        """A step of one of the layouts, rank by rank. Raises :class:`UserError` for a number that none has."""
        plan = self._plan(number)
        title = f"{self.job.name}, {self.search.ranks} x {self.machine.device.name}: {layout_name(plan)}"
        return Picture(timeline_svg(plan.run, title))

    def flags(self, number: int = 0) -> str:
        """What to give ``fft.train`` for one of the layouts. Raises :class:`UserError` for a number that none has."""
        return flags_text(self.job, self._plan(number))

    def settings(self, number: int = 0) -> str:
        """The same as the text of a file for ``--config``. Raises :class:`UserError` for a number that none has."""
        return settings_text(self.search, self._plan(number))

    def _plan(self, number: int) -> LayoutPlan:
        if not 0 <= number < len(self.plans):
            raise UserError(f"`number` is {number}, there are {len(self.plans)} layouts: 0 is the first.")
        return self.plans[number]


def find_layouts(
    model: str | Path,
    hardware: str | Path,
    *,
    ranks: int,
    seq_len: int = 4096,
    tokens_per_step: int = 1 << 22,
    train_tokens: float = 0.0,
    best: int = 10,
) -> FoundLayouts:
    """The ``best`` layouts of a model, a directory or a ``config.json``, on ``ranks`` devices of the machine that a
    file as in ``conf/hardware`` describes. Needs no device, weights or data.

    >>> from fft.plan import find_layouts
    >>> machine = "conf/hardware/8xa100-40g-pcie.yaml"
    >>> found = find_layouts("conf/models/llama-3m.json", machine, ranks=4, seq_len=512, tokens_per_step=4096, best=1)
    >>> found.flags()  # doctest: +ELLIPSIS
    '--seq_len 512 ...'

    Raises :class:`UserError` for models, machines and numbers that cannot be planned.
    """
    counts = {"ranks": ranks, "seq_len": seq_len, "tokens_per_step": tokens_per_step, "best": best}
    for name, number in counts.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"`{name}` is {number!r}: it must be a whole number from 1 on.")
    if not (isfinite(train_tokens) and train_tokens >= 0):
        raise UserError(f"`train_tokens` is {train_tokens!r}: it must be a number of tokens, or 0.")
    if tokens_per_step % seq_len:
        raise UserError(f"`tokens_per_step` {tokens_per_step} must be a multiple of `seq_len` {seq_len}.")
    machine, job = read_machine(hardware), read_job(str(model), seq_len, tokens_per_step)
    search = Search(job, machine, ranks)
    plans = search.best(best)
    if not plans:
        raise UserError(
            f"no layout of {ranks} x {machine.device.name} has the memory for {model} with rows of "
            f"{seq_len}: give more `ranks`, or a `tokens_per_step` that divides by more of them."
        )
    return FoundLayouts(job, machine, search, tuple(plans), train_tokens)
