"""``python -m fft.plan.validate FILE.csv``: what others have published, predicted."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fft.console import format_table
from fft.errors import Parser, UserError, run_cli
from fft.plan.others_memory import others_memory
from fft.plan.published import machine_of, run_of, source_of
from fft.plan.step import predict
from fft.plan.studies import FITTED, TRUSTED, trusted

_NEEDED = {"id", "model", "layers", "hidden", "heads", "vocab", "seq", "gpus", "device", "dp", "tp", "pp", "notes"}


@dataclass(frozen=True)
class PublishedRow:
    """A published run, and what is predicted of it; ``best`` is the planner's own layout where none is published."""

    published: dict[str, str]
    rate: float
    memory: float
    best: str = ""

    @property
    def error(self) -> float | None:
        """Of tokens a second, as a share of those that are published."""
        said = self.published["tokens_per_s_total"]
        return self.rate / float(said) - 1 if said and self.rate else None

    @property
    def memory_error(self) -> float | None:
        """Of the peak of memory."""
        said = self.published.get("peak_mem_gb", "")
        return self.memory / 1e9 / float(said) - 1 if said and self.memory else None


def read_published(path: Path) -> list[dict[str, str]]:
    """The rows of a file. Raises :class:`UserError` for one that is none."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    if not rows or (lacking := _NEEDED - set(rows[0])):
        raise UserError(
            f"{path} is no table of published runs: {', '.join(sorted(lacking if rows else _NEEDED))} missing."
        )
    return rows


def predicted(row: dict[str, str]) -> PublishedRow:
    """A row's prediction. Raises :class:`UserError` for numbers that are none, naming the row."""
    try:
        run = run_of(row)
        if run is None:
            return _without_layout(row)
        return PublishedRow(row, predict(run).rate, others_memory(run))
    except (ValueError, KeyError) as error:
        raise UserError(f"row {row['id']}: {error} is not understood; mend it or leave the row out.") from None


def _without_layout(row: dict[str, str]) -> PublishedRow:
    """What our trainer would reach with its best layout."""
    if not row["global_batch_samples"]:
        return PublishedRow(row, 0.0, 0.0)
    from fft.plan.search import Search
    from fft.plan.told import layout_name
    from fft.plan.unlaid import job_of

    found = Search(job_of(row), machine_of(row), int(row["gpus"])).best(1)
    if not found:
        return PublishedRow(row, 0.0, 0.0)
    return PublishedRow(row, found[0].prediction.rate, found[0].fullest, layout_name(found[0]))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of predicted and published."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [order.index(value) + (order.count(value) - 1) / 2 for value in values]

    first, second = (ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) - 1) / 2
    above = sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    spread = [sum((a - middle) ** 2 for a in side) for side in (first, second)]
    return above / (spread[0] * spread[1]) ** 0.5 if all(spread) else 0.0


def studies_of(rows: Sequence[PublishedRow]) -> dict[str, list[tuple[float, float]]]:
    """Predicted and published rates of what was laid out in several ways: one model on one number of devices."""
    groups = defaultdict(list)
    for row in rows:
        if row.error is not None and not row.best:
            said = row.published
            name = f"{source_of(said)}, {said['model']}, {said['seq']}, {said['gpus']} devices"
            groups[name].append((row.rate, float(said["tokens_per_s_total"])))
    return {name: pairs for name, pairs in groups.items() if len(pairs) >= 3}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def rows_table(rows: Sequence[PublishedRow]) -> str:
    """PublishedRow by row; F marks those that constants were fitted on, ? those that do not count."""
    heads = [
        "row",
        "",
        "model",
        "device",
        "layout",
        "tokens/s predicted",
        "published",
        "error %",
        "GB",
        "published GB",
        "error %",
    ]
    lines = []
    for row in rows:
        said = row.published
        layout = row.best or f"d{said['dp']} t{said['tp']} p{said['pp']} micro {said['micro_batch'] or '-'}"
        mark = "F" if said["id"] in FITTED else "" if trusted(said) else "?"
        device = f"{said['gpus']} {said['device']}"
        rate = f"{row.rate:,.0f}" if row.rate else "does not fit"
        line = [
            said["id"],
            mark,
            said["model"][:22],
            device,
            layout,
            rate,
            said["tokens_per_s_total"],
            _percent(row.error),
        ]
        lines.append([*line, f"{row.memory / 1e9:.1f}", said.get("peak_mem_gb", ""), _percent(row.memory_error)])
    return format_table(heads, lines)


def error_summary(errors: Sequence[float]) -> list[object]:
    """How many, and of their sizes the median, nine in ten, and the worst, in percent."""
    sizes = sorted(100 * abs(error) for error in errors)
    return [len(sizes), median(sizes), sizes[int(0.9 * (len(sizes) - 1) + 0.5)], sizes[-1]]


def summaries_table(rows: Sequence[PublishedRow]) -> str:
    """Errors of tokens/s by source, and of those that count together; then of memory."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.error is not None and not row.best:
            groups[source_of(row.published)].append(row.error)
    counted = [row for row in rows if row.error is not None and trusted(row.published)]
    lines = [[name, *error_summary(errors)] for name, errors in groups.items()]
    for name, fitted in (("those fitted on", True), ("the trustworthy rest", False)):
        errors = [row.error for row in counted if (row.published["id"] in FITTED) == fitted]
        lines += [[name, *error_summary([e for e in errors if e is not None])]] if errors else []
    memory = [row.memory_error for row in rows if row.memory_error is not None and not row.best]
    lines += [["memory, all rows", *error_summary(memory)]] if memory else []
    return format_table(["errors, %", "rows", "median", "nine in ten", "worst"], lines)


def correlations_table(rows: Sequence[PublishedRow]) -> str:
    """Rank correlations of what was laid out in three ways or more."""
    found = studies_of(rows)
    values = {name: (len(pairs), rank_correlation(pairs)) for name, pairs in found.items()}
    lines: list[list[object]] = [[name, *value] for name, value in values.items()]
    for name, sources in (("mean by rows, trustworthy", TRUSTED), ("mean by rows, all", None)):
        own = [value for study, value in values.items() if sources is None or study.partition(",")[0] in sources]
        if weights := sum(count for count, _ in own):
            lines.append([name, weights, sum(count * value for count, value in own) / weights])
    return format_table(["rank correlation within", "rows", "predicted with published"], lines)


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m fft.plan.validate", description="Predict published runs, and say how right that is."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV with the columns that docs/planner.md names")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Raises :class:`UserError` for a file that is no table of published runs."""
    rows = [predicted(row) for row in read_published(build_parser().parse_args(argv).file)]
    print(rows_table(rows))
    print(f"\n{summaries_table(rows)}\n\n{correlations_table(rows)}")
    at_hand = sorted(row.published["id"] for row in rows if row.published["id"] in FITTED)
    print(f"\nconstants were fitted on {len(at_hand)} of these {len(rows)} rows (F): {', '.join(at_hand) or 'none'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
