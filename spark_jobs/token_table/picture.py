"""A picture of a finished table: how long its documents are, what it is mixed from, how full its rows are; and how many
images and patches its rows have, where they have some."""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from fft.chart import shortened
from fft.console import say
from fft.data.manifest import Manifest, or_unknown
from fft.errors import UserError
from fft.files import write_atomically
from fft.redaction import redact_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = (".html", ".png")
_BLUE, _GREY = "#2f6690", "#c9d3dc"
#: Bars of a mixture at most, and characters of a name.
_MOST_BARS, _LONGEST_NAME = 12, 28
#: A mixture of fewer leaves room for so many.
_FEWEST_BARS = 6
_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Token table {{ names }}</title>
<style>
body { font: 15px sans-serif; margin: 2em auto; padding: 0 1em; max-width: 76em }
td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
td:first-child { min-width: 9em }
.shares { overflow-x: auto; font-variant-numeric: tabular-nums }
.shares td:first-child { min-width: 6em }
.shares td:nth-child(n+2) { white-space: nowrap; text-align: right }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
.charts svg { flex: 1 1 20em; min-width: 0; max-width: 34em; height: auto }
</style>
<h1>Token table {{ names }}</h1>
{% for table in tables %}
<h2>{{ table.name }}</h2>
<div class="charts">
{% for chart in table.charts %}
{{ chart|safe }}
{% endfor %}
</div>
{% for rows in table.facts %}
<div{% if rows[0]|length > 2 %} class="shares"{% endif %}><table>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ cell(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
"""

#: Draws one thing.
Chart = Callable[["Axes"], None]


def check_report(path: str | Path | None, overwrite: bool) -> None:
    """Raise :class:`UserError`, before a job begins, for a report that could not be written after it."""
    if path is None:
        return
    path = Path(path)
    if path.suffix not in KINDS:
        raise UserError(f"`report` {path} must end in {' or '.join(KINDS)}.")
    if not path.parent.is_dir():
        raise UserError(f"`report` {path}: there is no folder {path.parent}; make it first.")
    if path.exists() and not overwrite:
        raise UserError(f"`report` {path} exists: allow that with `overwrite=True`, or give another name.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("`report` needs matplotlib: pip install matplotlib.")


def write_report(manifests: Manifest | Mapping[str, Manifest], path: str | Path | None) -> None:
    """Draw what the manifests of a job say, a row of pictures for each table, as a PNG or an HTML page of its own; for
    no path, nothing."""
    if path is None:
        return
    path = Path(path)
    tables = {"": manifests} if isinstance(manifests, Manifest) else dict(manifests)
    if path.suffix == ".png":
        data = io.BytesIO()
        _figure([_charts(name, manifest) for name, manifest in tables.items()]).savefig(data, format="png")
        write_atomically(path, data.getvalue())
    else:
        write_atomically(path, _page(tables))
    say(f"wrote {path}")


def _figure(charts: Sequence[Sequence[Chart]]) -> "Figure":
    """Rows of charts, as many in each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(map(len, charts)), 4 * len(charts)), dpi=100, layout="constrained")
    grid = figure.subplots(len(charts), max(map(len, charts)), squeeze=False)
    for axes, row in zip(grid, charts, strict=True):
        for own in axes[len(row) :]:
            own.set_axis_off()
        for own, draw in zip(axes, row, strict=False):
            draw(own)
    return figure


def _charts(name: str, manifest: Manifest) -> list[Chart]:
    """What is drawn of a table."""
    counts = manifest.lineage["counts"]
    charts: list[Chart] = [
        partial(_draw_lengths, name=name, histogram=counts.get("lengths", {})),
        partial(_draw_mixture, manifest=manifest),
        partial(_draw_packing, manifest=manifest),
    ]
    if manifest.vision is not None:
        facts = counts.get("vision", {})
        charts += [partial(_draw_images, facts=facts, what=what) for what in ("images", "patches")]
    return charts


def _draw_lengths(axes: "Axes", name: str, histogram: Mapping[str, int]) -> None:
    _draw_bins(axes, histogram)
    axes.set(title=f"{name} documents by length".strip(), xlabel="tokens, at least", ylabel="documents")


def _draw_images(axes: "Axes", facts: Mapping[str, Any], what: str) -> None:
    _draw_bins(axes, facts.get(f"{what}_per_row", {}))
    axes.set(title=f"{facts.get(what, 0):,} {what}", xlabel=f"{what} of a row, at least", ylabel="rows")


def _draw_bins(axes: "Axes", histogram: Mapping[str, int]) -> None:
    """Bars of a histogram by powers of two, and perhaps of zero."""
    counts = {int(least): n for least, n in histogram.items()}
    full = [least for least in counts if least]
    bins = [1 << k for k in range(min(full).bit_length() - 1, max(full).bit_length())] if full else []
    bins = [0, *bins] if 0 in counts else bins
    axes.bar([f"{least:,}" for least in bins], [counts.get(b, 0) for b in bins], color=_BLUE, width=0.9)
    for label in axes.get_xticklabels():
        label.set(rotation=60, ha="right", rotation_mode="anchor")
    _whole(axes.yaxis)


def _draw_mixture(axes: "Axes", manifest: Manifest) -> None:
    names, tokens = zip(*_mixed(manifest), strict=True)
    bars = axes.barh(range(len(names)), tokens, color=_BLUE, height=0.6)
    axes.set_yticks(range(len(names)), names)
    _whole(axes.xaxis, 5)
    axes.bar_label(bars, [f"{n / max(1, sum(tokens)):.1%}" for n in tokens], padding=3)
    axes.margins(x=0.35)
    room = max(0, _FEWEST_BARS - len(names)) / 2  # few bars are no thicker than many
    axes.set_ylim(len(names) - 0.4 + room, -0.6 - room)
    trained = manifest.trained_tokens
    told = "" if trained is None else f", {trained / max(1, manifest.tokens):.1%} trained on"
    axes.set(title=f"{_short_count(manifest.tokens)} tokens{told}", xlabel="tokens, by dataset")


def _mixed(manifest: Manifest) -> list[tuple[str, int]]:
    """Names of datasets and their tokens, the largest first, those that are small together."""
    datasets = manifest.lineage["counts"].get("datasets") or {"all": {"tokens": manifest.tokens}}
    found = [(shortened(Path(name).name or name, _LONGEST_NAME), own["tokens"]) for name, own in datasets.items()]
    found.sort(key=lambda one: -one[1])
    if len(found) <= _MOST_BARS:
        return found
    rest = found[_MOST_BARS - 1 :]
    return [*found[: _MOST_BARS - 1], (f"{len(rest)} others", sum(tokens for _, tokens in rest))]


def _draw_packing(axes: "Axes", manifest: Manifest) -> None:
    files = [file.path for file in manifest.files]
    tokens = [file.tokens for file in manifest.files]
    unused = manifest.lineage["counts"].get("unused")
    title = f"{len(files):,} file{'s' * (len(files) != 1)}"
    if unused is not None and manifest.seq_len is not None:
        free = [file.rows * manifest.seq_len - file.tokens for file in manifest.files]
        axes.bar(range(len(files)), free, bottom=tokens, color=_GREY, label="unused positions")
        title += f", {1 - unused / (manifest.tokens + unused):.3%} of positions used"
    axes.bar(range(len(files)), tokens, color=_BLUE, label="tokens")
    _whole(axes.yaxis)
    _whole(axes.xaxis, 5)
    axes.set_xlim(-0.8, len(files) - 0.2)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)  # below, over no bar
    axes.set(title=title, xlabel="file", ylabel="tokens")


def _whole(axis: "Axis", most: int = 8) -> None:
    """Ticks of an axis that counts: whole numbers, 20k, 1.5M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axis.set_major_formatter(EngFormatter(sep=""))


def _short_count(count: int) -> str:
    """A count in three digits."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _page(tables: Mapping[str, Manifest]) -> str:
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE)
        .render(
            names=" and ".join(name for name in tables if name),
            tables=[
                {
                    "name": name,
                    "charts": [_svg(chart) for chart in _charts(name, manifest)],
                    "facts": _facts(manifest),
                }
                for name, manifest in tables.items()
            ],
            cell=_cell,
        )
    )


def _svg(chart: Chart) -> str:
    data = io.StringIO()
    _figure([[chart]]).savefig(data, format="svg")
    picture = data.getvalue()
    return picture[picture.index("<svg") :]


def _facts(manifest: Manifest) -> list[list[tuple[object, ...]]]:
    """Tables of rows of cells."""
    lineage = redact_all(manifest.lineage)
    counts = {k: v for k, v in lineage["counts"].items() if not isinstance(v, Mapping)}
    facts = {
        "job": lineage["job"],
        "inputs": ", ".join(lineage["inputs"]),
        **{name: _listed(value) for name, value in lineage["parameters"].items()},
        **counts,
        **{name: or_unknown(getattr(manifest, name)) for name in ("trained_tokens", "untrained_tokens")},
        "tokens/s": lineage["timing"]["tokens_per_second"],
    }
    tables: list[list[tuple[object, ...]]] = [[(name, value) for name, value in facts.items() if value is not None]]
    if datasets := lineage["counts"].get("datasets"):
        rows, tokens = (max(1, sum(own[name] for own in datasets.values())) for name in ("rows", "tokens"))
        shared = [
            (n, d["rows"], f"{d['rows'] / rows:.1%}", d["tokens"], f"{d['tokens'] / tokens:.1%}")
            for n, d in datasets.items()
        ]
        tables.append([("dataset", "rows", "share", "tokens", "share"), *shared])
    if vision := lineage["counts"].get("vision"):
        tables.append([(name, value) for name, value in vision.items() if not isinstance(value, Mapping)])
    return tables


def _listed(value: object) -> object:
    """A parameter that holds several as a reader writes them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(own)}" for name, own in value.items())
    return value


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
