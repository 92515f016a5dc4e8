"""The page: numbers on top, curves, then what the run was made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from statistics import mean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from fft.chart import COLOURS, Line, chart, shortened
from fft.data.manifest import or_unknown
from fft.report.run import Run
from fft.training.metric_sinks import by_dataset_in, loss_name, named_in, trained_by_dataset

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5c6b7a; --line: #dde3e9; --page: #fff; --tile: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #9aa8b5; --line: #33404c; --page: #161c22; --tile: #1f272f }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2em auto;
  max-width: 70em; padding: 0 1em }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.15em; margin: 2em 0 .6em } h3 { font-size: 1em; margin: 0 0 .3em }
h1, h2, h3, p, .tile { overflow-wrap: anywhere }
p.soft, .soft { color: var(--soft) }
.tiles, .charts { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(12em, 1fr)); margin: 1.2em 0 }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(27em, 100%), 1fr)) }
.tile { background: var(--tile); border-radius: 8px; padding: .7em 1em }
.tile b { display: block; font-size: 1.35em; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
svg .grid { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
svg .pale { stroke-width: 1; opacity: .3 }
{% for colour in colours %}polyline.c{{ loop.index0 }} { stroke: {{ colour }} }
circle.c{{ loop.index0 }} { fill: {{ colour }} } .key.c{{ loop.index0 }} { background: {{ colour }} }
{% endfor %}
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 1em }
.keys { font-size: .87em; font-weight: normal } .keys .key:first-child { margin-left: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { max-width: 40em; overflow-wrap: break-word }
td, th { padding: .25em 1.2em .25em 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
pre { background: var(--tile); border-radius: 8px; padding: 1em; overflow-x: auto; font-size: 12px }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if runs|length > 1 %}
<p>{% for run in runs %}<span class="key c{{ loop.index0 }}"></span>{{ run.name }}{% endfor %}</p>
{% endif %}
<div class="tiles">
{% for name, value in tiles %}<div class="tile"><span class="soft">{{ name }}</span><b>{{ value }}</b></div>
{% endfor %}
</div>
<div class="charts">
{% for name, note, picture in charts %}<div><h3>{{ name }} <span class="soft">{{ note }}</span></h3>{{ picture|safe }}
</div>
{% endfor %}
</div>
{% for heading, header, rows in tables %}
<h2>{{ heading }}</h2>
<div class="wide"><table>
<tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>Layout and memory, as planned</h2>
{% for run in runs %}
{% if runs|length > 1 %}<p class="soft">{{ run.name }}</p>{% endif %}
<pre>{{ run.planned }}</pre>
{% endfor %}
</body>
</html>
"""


def page_of(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several beside one another; the first is what they are compared with."""
    page = Environment(autoescape=True).from_string(_PAGE)
    title = runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more"
    pictures = [(name, note, picture) for name, note, picture in charts_of(runs) if picture]
    return page.render(
        title=f"Run {title}",
        runs=runs,
        tiles=list(tiles_of(runs[0])),
        charts=pictures,
        tables=list(tables_of(runs)),
        colours=COLOURS,
    )


def tiles_of(run: Run) -> Iterable[tuple[str, str]]:
    """What is asked first."""
    yield "steps", f"{run.steps:,}"
    for name, number, told in _TILES:
        value = run.last(number)
        if value is not None:
            yield name, told(value)
    losses = [value for _, value in run.points("eval_loss")]
    if losses:
        yield "best evaluation", f"{min(losses):.4f}"


def charts_of(runs: Sequence[Run]) -> Iterable[tuple[str, str, str]]:
    """Name, what is to be known of it, and picture."""
    for name, note, number, told in _CHARTS:
        unit = _UNITS.get(number, 1)
        points = [[(step, value / unit) for step, value in run.points(number)] for run in runs]
        lines = [Line(run.name, own, colour) for colour, (run, own) in enumerate(zip(runs, points, strict=True))]
        if number == "loss":
            evaluated = [run.points("eval_loss") for run in runs]
            lines += [
                Line(f"{r.name}, held out", e, c, True) for c, (r, e) in enumerate(zip(runs, evaluated, strict=True))
            ]
            note = "dots: held out" if any(evaluated) else note
        yield name, note, chart(name, lines, told)
    names = list(dict.fromkeys(name for run in runs for name in named_in(run.numbers)))
    for name in names:
        points = [Line(run.name, run.points(loss_name(name)), at, True) for at, run in enumerate(runs)]
        yield _shortened(f"Held out: {name}"), "loss", chart(name, points, lambda value: f"{value:.4g}")
    for run in runs:
        for heading, own in _by_dataset(run, len(runs) > 1):
            yield _shortened(heading), *_lines_by_dataset(run, own)


def _shortened(name: str) -> Markup:
    """A name that is short enough for a heading; a pointer is shown all of it."""
    return Markup('<span title="{}">{}</span>').format(name, shortened(name, 48))


def _by_dataset(run: Run, several: bool) -> Iterable[tuple[str, Mapping[str, str]]]:
    """The numbers that are told by dataset, and what these are: of which run, where there are several, and of which
    table, if it has a name.
    """
    found = [("Trained on", "", trained)] if (trained := trained_by_dataset(run.numbers)) else []
    found += [("Held out", table, own) for table, own in by_dataset_in(run.numbers).items()]
    for what, table, own in found:
        of = ", ".join(name for name in (run.name if several else "", table) if name)
        yield f"{what} by dataset{of and f': {of}'}", own


def _lines_by_dataset(run: Run, own: Mapping[str, str]) -> tuple[str, str]:
    """The key and the picture of the losses of as many datasets as there are colours, those with the highest ones."""
    last = {dataset: run.last(number) or 0.0 for dataset, number in own.items()}
    told = sorted(last, key=lambda dataset: last[dataset], reverse=True)[: len(COLOURS)]
    lines = [Line(dataset, run.points(own[dataset]), colour) for colour, dataset in enumerate(told)]
    keys = [Markup('<span class="key c{}"></span>{}').format(at, _shortened(name)) for at, name in enumerate(told)]
    some = [f" (the highest {len(told)} of {len(own)})"] if len(told) < len(own) else []
    return Markup("<div class=keys>{}</div>").format(Markup("").join([*keys, *some])), chart(
        "loss by dataset", lines, lambda value: f"{value:.4g}"
    )


def tables_of(runs: Sequence[Run]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Heading, head and rows."""
    names = [run.name for run in runs]
    several = len(runs) > 1
    if several:
        yield "Compared", ["", *names], [_compared(name, number, told, runs) for name, number, told in _TILES]
    for run in runs:
        for heading, own in _by_dataset(run, several):
            yield heading, ["dataset", "last loss", "lowest", "at step", "over"], [*_datasets(run, own)]
    yield "Data", ["run", "what", *_TABLE], list(_data(runs))
    rows = [row for run in runs for row in _ranks(run)]
    if rows:
        head = ["run", "rank", "own work", "waiting for others", "times it was behind", "last"]
        yield "Ranks, seconds a step", head, rows
    rows = [[r.name, f"{c.step:,}", _loss(c.eval_loss), f"{c.size / 1e6:,.1f} MB"] for r in runs for c in r.checkpoints]
    if rows:
        yield "Checkpoints", ["run", "step", "evaluation", "size"], rows
    changed = {name: pair[0] for run in runs for name, pair in run.changed.items()}
    settings = [
        [name, *(_plain(run.arguments.get(name)) for run in runs), _plain(default)]
        for name, default in sorted(changed.items())
    ]
    yield "Settings that are not the default", ["", *names, "default"], settings
    facts = dict.fromkeys(name for run in runs for name in run.environment)
    yield "Environment", ["", *names], [[name, *(_plain(r.environment.get(name)) for r in runs)] for name in facts]
    unread = [[run.name, str(run.unread)] for run in runs if run.unread]
    if unread:
        yield "Lines of numbers that could not be read", ["run", "lines"], unread


def _data(runs: Sequence[Run]) -> Iterable[list[str]]:
    for run in runs:
        for what, found in run.data.items():
            said = found.get("tables") if isinstance(found, dict) else None
            for source in said if isinstance(said, list) else [found]:  # runs of older releases say less of them
                if isinstance(source, dict):
                    trained = or_unknown(source.get("trained")) if "table" in source else ""
                    yield [run.name, what, *(_count(source.get(key)) for key in _TABLE[:-1]), _count(trained)]


def _datasets(run: Run, own: Mapping[str, str]) -> Iterable[list[str]]:
    """Of every dataset the last and the lowest of its losses, and over how much these are."""
    for dataset, number in own.items():
        points = run.points(number)
        if points:
            step, lowest = min(points, key=lambda point: point[1])
            first, _, name = number.rpartition("loss/")
            held = [f"{value:,.0f} {of}" for of in ("tokens", "pairs") if (value := run.last(f"{first}{of}/{name}"))]
            yield [dataset, f"{points[-1][1]:.4f}", f"{lowest:.4f}", f"{step:,.0f}", *held]


def _ranks(run: Run) -> Iterable[list[str]]:
    """Of every rank the mean of a step's work and waiting, and how often, and when, it was told to be behind."""
    behind = run.points("rank_behind")
    for rank in range(sum(name.startswith("rank_work/") for name in run.numbers)):
        spent = [[value for _, value in run.points(f"{name}/{rank}")] for name in ("rank_work", "rank_wait")]
        steps = [step for step, which in behind if which == rank]
        last = f"up to step {steps[-1]:,.0f}" if steps else ""
        yield [run.name, str(rank), *(_short(mean(x)) if x else "" for x in spent), str(len(steps) or ""), last]


def _compared(name: str, number: str, told: Callable[[float], str], runs: Sequence[Run]) -> list[str]:
    values = [run.last(number) for run in runs]
    return [name, *("" if value is None else told(value) for value in values)]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    return "" if value is None else str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _plain(value)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _short(value: float) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"


#: In what a picture has a number, so that the ticks of its axis are round.
_UNITS = {"memory": 2**30}
#: What is told of a table.
_TABLE = ("table", "version", "fingerprint", "rows", "tokens", "trained")
_TILES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", lambda value: f"{value:.4f}"),
    ("evaluation", "eval_loss", lambda value: f"{value:.4f}"),
    ("tokens a second", "tokens_per_second", lambda value: f"{value:,.0f}"),
    ("MFU", "mfu", lambda value: f"{100 * value:.1f} %"),
    ("MFU of the datasheet", "mfu_datasheet", lambda value: f"{100 * value:.1f} %"),
    ("memory of a rank", "memory", _bytes),
    ("pipeline bubble", "pipeline_bubble", lambda value: f"{100 * value:.1f} %"),
    ("time", "seconds", _clock),
)
_CHARTS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("Loss", "", "loss", lambda value: f"{value:.4g}"),
    ("Gradient norm", "", "grad_norm", _short),
    ("Learning rate", "", "lr", lambda value: f"{value:.3g}"),
    ("Tokens a second", "all ranks", "tokens_per_second", _short),
    ("MFU", "of the matrix rate that was measured", "mfu", lambda value: f"{100 * value:.3g} %"),
    ("Waiting for data", "share of the time", "data_wait", lambda value: f"{100 * value:.3g} %"),
    ("Slowest rank", "seconds of its own work a step", "slowest_rank_seconds", _short),
    ("Memory", "of the fullest rank, at most", "memory", lambda value: f"{value:.3g} GiB"),
    ("Saving", "seconds", "save_seconds", _short),
    ("Balance of experts", "1 is even", "aux_loss", _short),
    ("Preferences", "share in which the chosen one's reward is larger", "rewards/accuracies", _short),
    ("Margin of rewards", "in the mean", "rewards/margins", _short),
    ("Loss scale", "fp16", "loss_scale", _short),
)
