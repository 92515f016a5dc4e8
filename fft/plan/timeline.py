"""A step as a picture: a line for each stage, what it computes, sends and waits for."""

from html import escape

from fft.plan.run import PlannedRun
from fft.plan.schedule import BACKWARD, FORWARD, Played
from fft.plan.step import play, stage_times

#: Turns of the pipeline that are drawn at most: a step of many is the same again and again.
_TURNS = 3
_WIDTH, _LINE, _LEFT = 1200, 22, 70
_COLOURS = {FORWARD: "#4c78a8", BACKWARD: "#f58518"}
_MESSAGE = "#b0b0b0"


def timeline_svg(run: PlannedRun, title: str) -> str:
    """The passes of a step, or of its first micro-batches, as SVG."""
    micros = min(run.accumulated, _TURNS * run.sides.pipe)
    played = play(run, stage_times(run), micros)
    height = 60 + _LINE * len(played.spans)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 10}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="4" y="16">{escape(title)}</text>',
        f'<text x="4" y="32" fill="#666">{micros} of {run.accumulated} micro-batches, {1e3 * played.seconds:.1f} ms; '
        "blue forward, orange backward, grey messages, white waits</text>",
    ]
    lines += [_stage(played, stage) for stage in range(len(played.spans))]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _stage(played: Played, stage: int) -> str:
    y, scale = 42 + _LINE * stage, _WIDTH / played.seconds
    parts = [f'<text x="4" y="{y + 14}">stage {stage}</text>']
    for task, begin, end in played.spans[stage]:
        x, width = _LEFT + begin * scale, (end - begin) * scale
        if width < 0.05:
            continue
        colour = _COLOURS.get(task.kind, _MESSAGE)
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_LINE - 4}" fill="{colour}" stroke="#fff" '
            f'stroke-width="0.3"><title>{task.kind} {task.micro}: {1e3 * (end - begin):.2f} ms</title></rect>'
        )
    return "".join(parts)
