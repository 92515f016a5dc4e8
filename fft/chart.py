"""Lines over steps, and bars, as SVG: no script, no font, no picture from elsewhere; a notebook's tables."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fft.files import write_atomically

Point = tuple[float, float]
#: Colours of lines; a picture has no more.
COLOURS = ("#2f6690", "#c8553d", "#588b4a", "#8a5fa3", "#b08900", "#3a9ca6")
#: Size of a chart and room for its labels, in pixels.
WIDTH, HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 10, 28
_CAPTION = 20
#: Points of a line at most: two a pixel.
_MOST = 2 * (WIDTH - _LEFT - _RIGHT)
#: A line of more points is drawn pale, with the mean of every so many of them over it.
_SMOOTHED, _WINDOWS = 200, 100
#: A value further from the middle half than so many times its width is cut off at the edge: one spike hides no curve.
_FENCE = 6.0
#: Of less than that an axis has no numbers: floats end there.
_NOTHING = 1e-290


#: Height of a bar with its room, and room for a bar's name and for its number.
_BAR, _NAME, _NUMBER = 22, 170, 90
#: Characters of a bar's name.
_LONGEST = 26


@dataclass(frozen=True)
class Picture:
    """An SVG file, which a notebook shows below the cell.

    >>> Picture("<svg/>").save("/tmp/loss.svg")  # doctest: +SKIP
    """

    svg: str

    def _repr_html_(self) -> str:
        # As an image: its styles are to be no others' in the notebook.
        if not self.svg:
            return "<p>no numbers</p>"
        data = base64.b64encode(self.svg.encode()).decode()
        # No wider than the cell, unless words would be too small to be read: it scrolls then.
        return (
            f'<div style="overflow-x: auto"><img src="data:image/svg+xml;base64,{data}" '
            'style="max-width: max(100%, 30em)"></div>'
        )

    def save(self, path: str | Path) -> None:
        """Write it into a file, whole or not at all."""
        write_atomically(Path(path), self.svg)


def notebook_table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table as HTML, whose styles are its own: long texts are broken, and what is still too wide scrolls."""

    def cell(value: object) -> str:
        if isinstance(value, int | float):
            told = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            return f'<td style="text-align: right; vertical-align: top">{told}</td>'
        text = str(value)
        style = "text-align: left; vertical-align: top; max-width: 40em; overflow-wrap: anywhere"
        return f'<td style="{style}; min-width: {min(18, len(text)) / 2:g}em">{escape(text)}</td>'

    lines = ["".join(f'<th style="text-align: left">{escape(name)}</th>' for name in head)] if head else []
    lines += ["".join(map(cell, row)) for row in rows]
    return f'<div style="overflow-x: auto"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


@dataclass(frozen=True)
class Line:
    """Points by step, finite ones alone; ``colour`` is a number of the page's; with ``marks`` they are dots."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    marks: bool = False


def chart(title: str, lines: Sequence[Line], told: Callable[[float], str]) -> str:
    """The SVG of lines; ``told`` writes a value. Without any point an empty string."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    low, high = _range([y for line in lines for _, y in line.points])
    first = min(line.points[0][0] for line in lines)
    last = max(line.points[-1][0] for line in lines)
    across = _scale(first, last if last > first else first + 1, _LEFT, WIDTH - _RIGHT)
    up = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in ticks(low, high, 5):
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(told(value))}</text>')
    for value in ticks(first, last, 6):
        if value == int(value):
            where = f'x="{across(value):.1f}" y="{HEIGHT - 8}"'
            parts.append(f'<text {where} text-anchor="middle">{int(value):,}</text>')
    parts += [_drawn(line, across, up, told) for line in lines]
    return "".join([*parts, "</svg>"])


def picture_file(svg: str, caption: str) -> str:
    """The SVG of a chart as a file of its own, on white, below a caption."""
    style = "text{font:11px sans-serif;fill:#5c6b7a}.grid{stroke:#dde3e9}.pale{stroke-width:1;opacity:.3}"
    style += "polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    for number, colour in enumerate(COLOURS):
        style += f"polyline.c{number}{{stroke:{colour}}}circle.c{number}{{fill:{colour}}}"
    size = f'width="{WIDTH}" height="{HEIGHT + _CAPTION}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 -{_CAPTION} {WIDTH} {HEIGHT + _CAPTION}">'
    ground = f'<rect y="-{_CAPTION}" {size} fill="#fff"/><text x="{_LEFT}" y="-6">{escape(caption)}</text>'
    return f"{head}<style>{style}</style>{ground}{svg.partition('>')[2]}\n"


def losses(
    training: Sequence[Point], validation: Sequence[Point], others: Mapping[str, Sequence[Point]] | None = None
) -> str:
    """The SVG of a run's losses by step as a file of its own; without any point an empty string.

    ``others`` are those of further tables by name, as far as there are colours: the report has all.
    """
    lines = [Line("training", training), Line("validation", validation, 1, marks=True)]
    for colour, (name, points) in enumerate([*(others or {}).items()][: len(COLOURS) - 2], start=2):
        lines.append(Line(f"validation, {name}", points, colour, marks=True))
    caption = "loss by step; dots: validation"
    drawn = chart(caption, lines, lambda value: f"{value:.4g}")
    return picture_file(drawn, caption) if drawn else ""


def bars(charts: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> str:
    """The SVG, a file of its own, of charts one below the other, each a title and bars: name, value, and what is told
    of it. Bars begin at 0, and the longest of a chart ends where its number has room."""
    parts, at = [], 0.0
    for title, rows in charts:
        at += _CAPTION
        parts.append(f'<text x="8" y="{at:.0f}" font-weight="bold">{escape(title)}</text>')
        at += 8
        most = max((value for _, value, _ in rows), default=0) or 1
        for name, value, told in rows:
            length = (WIDTH - _NAME - _NUMBER) * max(0.0, value) / most
            middle = at + _BAR / 2 + 4
            parts.append(f'<text x="{_NAME - 8}" y="{middle:.0f}" text-anchor="end">{escape(shortened(name))}</text>')
            place = f'x="{_NAME}" y="{at + 3:.0f}" width="{length:.1f}" height="{_BAR - 6}"'
            parts.append(f'<rect {place} fill="{COLOURS[0]}"><title>{escape(name)}: {escape(told)}</title></rect>')
            parts.append(f'<text x="{_NAME + length + 6:.1f}" y="{middle:.0f}">{escape(told)}</text>')
            at += _BAR
        at += 10
    size, text = f'width="{WIDTH}" height="{at:.0f}"', 'font-family="sans-serif" font-size="11" fill="#5c6b7a"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {at:.0f}"><rect {size} fill="#fff"/>'
    return f"{head}<g {text}>{''.join(parts)}</g></svg>\n"


def shortened(name: str, longest: int = _LONGEST) -> str:
    """A name with its middle left out where it is long.

    >>> shortened("a-very-long-name-of-a-dataset-2026")
    'a-very-long- … ataset-2026'
    """
    half = longest // 2 - 1
    return name if len(name) <= longest else f"{name[:half]} … {name[half + 3 - longest :]}"


def _drawn(
    line: Line, across: Callable[[float], float], up: Callable[[float], float], told: Callable[[float], str]
) -> str:
    def placed(points: Sequence[Point]) -> list[Point]:
        return [(across(x), min(max(up(y), _TOP), HEIGHT - _BOTTOM)) for x, y in points]

    def path(points: Sequence[Point], style: str) -> str:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed(points))
        return f'<polyline class="c{line.colour}{style}" points="{places}">{title}</polyline>'

    step, value = line.points[-1]
    title = f"<title>{escape(line.label)}: {escape(told(value))} at step {step:,.0f}</title>"
    points = thinned(line.points, _MOST)
    if line.marks or len(points) == 1:
        dots = (
            f'<circle class="c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
            for x, y in placed(points)
        )
        return "".join(dots)
    if len(line.points) <= _SMOOTHED:
        return path(points, "")
    return path(points, " pale") + path(means(line.points, len(line.points) // _WINDOWS), "")


def means(points: Sequence[Point], size: int) -> list[Point]:
    """Of every ``size`` points in their order the mean, the last of fewer."""
    stretches = (points[begin : begin + size] for begin in range(0, len(points), size))
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in stretches]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points, two or more: of each stretch the lowest and the highest, in their order."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    if high - low <= _NOTHING:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    begin = math.ceil(low / step - 1e-9)
    # Each is the nearest float of its decimal: 3 * 0.1 is not.
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(begin, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From where to where the axis goes: all values, but not what is far off most of them."""
    ordered = sorted(values)
    quarter, three = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    fence = _FENCE * (three - quarter) or math.inf
    low, high = max(ordered[0], quarter - fence), min(ordered[-1], three + fence)
    if high - low > _NOTHING:
        return low, high
    return low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda value: begin + (value - low) / (high - low) * (end - begin)
