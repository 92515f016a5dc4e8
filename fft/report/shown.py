"""The page of runs from Python: a notebook shows it below the cell."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from fft.chart import COLOURS, Picture
from fft.errors import UserError, one_line
from fft.files import write_atomically
from fft.report.page import page_of
from fft.report.run import Run, read_run


@dataclass(frozen=True)
class Report:
    """A page about runs, the first of which the others are compared with; see :func:`report_on`."""

    runs: tuple[Run, ...]

    @property
    def page(self) -> str:
        """Its HTML, which needs nothing else."""
        return page_of(self.runs)

    def _repr_html_(self) -> str:
        # In a frame: its styles are to be no others' in the notebook.
        return f'<iframe srcdoc="{escape(self.page)}" style="width: 100%; height: 600px; border: 0"></iframe>'

    def plot(self) -> Picture:
        """The losses of the first run by step."""
        return self.runs[0].plot()

    def save(self, path: str | Path) -> None:
        """Write the page. Raises :class:`UserError` for a place that cannot be written to."""
        try:
            write_atomically(Path(path), self.page)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror or one_line(error)}): name another place."
            ) from error


def report_on(*runs: str | Path) -> Report:
    """A page about the run of a folder that ``--checkpoint`` named, or about several beside one another.

    >>> from fft.report import report_on
    >>> report_on("runs/a", "runs/b").save("both.html")  # doctest: +SKIP

    Raises :class:`UserError` for folders that are no runs, and for too many of them.
    """
    if not 0 < len(runs) <= len(COLOURS):
        raise UserError(
            f"{len(runs)} runs are too many for one picture: give {len(COLOURS)} at most, and at least one."
        )
    return Report(tuple(read_run(Path(run)) for run in runs))
