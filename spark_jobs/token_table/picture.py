"""A picture of a finished table: how long its documents are, what it is mixed from, how full its rows are; and how many
images and patches its rows have, where they have some."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from fft.console import say
from fft.data.manifest import Manifest
from fft.errors import UserError
from fft.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

KINDS = (".html", ".png")
_BLUE, _GREY = "#2f6690", "#c9d3dc"
_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>Token table {{ names }}</title>
<style>
body { font: 15px sans-serif; margin: 2em; max-width: 70em }
td, th { padding: .2em .9em .2em 0; text-align: left }
</style>
<h1>Token table {{ names }}</h1>
{{ picture|safe }}
{% for name, tables in facts.items() %}
<h2>{{ name }}</h2>
{% for rows in tables %}
<table>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ cell(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% endfor %}
"""


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
    figure = _figure(tables)
    data = io.BytesIO()
    figure.savefig(data, format="png" if path.suffix == ".png" else "svg")
    content = data.getvalue() if path.suffix == ".png" else _page(tables, data.getvalue().decode())
    write_atomically(path, content)
    say(f"wrote {path}")


def _figure(tables: Mapping[str, Manifest]) -> "Figure":
    from matplotlib.figure import Figure

    columns = 5 if any(manifest.vision is not None for manifest in tables.values()) else 3
    figure = Figure(figsize=(14 * columns / 3, 4 * len(tables)), dpi=100, layout="constrained")
    grid = figure.subplots(len(tables), columns, squeeze=False)
    for axes, (name, manifest) in zip(grid, tables.items(), strict=True):
        _draw_lengths(axes[0], name, manifest.lineage["counts"].get("lengths", {}))
        _draw_mixture(axes[1], manifest)
        _draw_packing(axes[2], manifest)
        if columns > 3:
            _draw_images(axes[3:], manifest.lineage["counts"].get("vision", {}))
    return figure


def _draw_lengths(axes: "Axes", name: str, histogram: Mapping[str, int]) -> None:
    _draw_bins(axes, histogram)
    axes.set(title=f"{name} documents by length".strip(), xlabel="tokens, at least", ylabel="documents")


def _draw_images(axes: "Sequence[Axes]", facts: Mapping[str, Any]) -> None:
    for own, what in zip(axes, ("images", "patches"), strict=True):
        _draw_bins(own, facts.get(f"{what}_per_row", {}))
        own.set(title=f"{facts.get(what, 0):,} {what}", xlabel=f"{what} of a row, at least", ylabel="rows")


def _draw_bins(axes: "Axes", histogram: Mapping[str, int]) -> None:
    """Bars of a histogram by powers of two, and perhaps of zero."""
    counts = {int(least): n for least, n in histogram.items()}
    full = [least for least in counts if least]
    bins = [1 << k for k in range(min(full).bit_length() - 1, max(full).bit_length())] if full else []
    bins = [0, *bins] if 0 in counts else bins
    axes.bar([f"{least:,}" for least in bins], [counts.get(b, 0) for b in bins], color=_BLUE, width=0.9)
    axes.tick_params(axis="x", rotation=60)


def _draw_mixture(axes: "Axes", manifest: Manifest) -> None:
    datasets = manifest.lineage["counts"].get("datasets") or {"all": {"tokens": manifest.tokens}}
    names = [Path(name).name or name for name in datasets]
    tokens = [own["tokens"] for own in datasets.values()]
    bars = axes.barh(names, tokens, color=_BLUE, height=0.6)
    axes.xaxis.set_major_formatter(_counts())
    axes.bar_label(bars, [f"{n / max(1, sum(tokens)):.1%}" for n in tokens], padding=3)
    axes.margins(x=0.18, y=max(0.05, 1 / len(names) ** 2))
    axes.invert_yaxis()
    axes.set(title=f"mixture of {manifest.tokens:,} tokens", xlabel="tokens")


def _draw_packing(axes: "Axes", manifest: Manifest) -> None:
    files = [file.path for file in manifest.files]
    tokens = [file.tokens for file in manifest.files]
    unused = manifest.lineage["counts"].get("unused")
    title = f"{len(files)} files"
    if unused is not None and manifest.seq_len is not None:
        free = [file.rows * manifest.seq_len - file.tokens for file in manifest.files]
        axes.bar(range(len(files)), free, bottom=tokens, color=_GREY, label="unused positions")
        title += f", {1 - unused / (manifest.tokens + unused):.3%} of positions used"
    axes.bar(range(len(files)), tokens, color=_BLUE, label="tokens")
    axes.yaxis.set_major_formatter(_counts())
    axes.legend(loc="lower right")
    axes.set(title=title, xlabel="file", ylabel="tokens")


def _counts() -> "EngFormatter":
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")  # 20k, 1.5M


def _page(tables: Mapping[str, Manifest], picture: str) -> str:
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE)
        .render(
            names=" and ".join(name for name in tables if name),
            picture=picture[picture.index("<svg") :],
            facts={name: _facts(manifest) for name, manifest in tables.items()},
            cell=_cell,
        )
    )


def _facts(manifest: Manifest) -> list[list[tuple[object, ...]]]:
    """Tables of rows of cells."""
    lineage = manifest.lineage
    counts = {k: v for k, v in lineage["counts"].items() if not isinstance(v, Mapping)}
    facts = {
        "job": lineage["job"],
        "inputs": ", ".join(lineage["inputs"]),
        **lineage["parameters"],
        **counts,
        "tokens/s": lineage["timing"]["tokens_per_second"],
    }
    tables: list[list[tuple[object, ...]]] = [list(facts.items())]
    if datasets := lineage["counts"].get("datasets"):
        tables.append([("dataset", "rows", "tokens"), *((n, d["rows"], d["tokens"]) for n, d in datasets.items())])
    if vision := lineage["counts"].get("vision"):
        tables.append([(name, value) for name, value in vision.items() if not isinstance(value, Mapping)])
    return tables


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
