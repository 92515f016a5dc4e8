"""Write docs/flags.md, the flags of all commands as their parsers know them: ``make docs``."""

import argparse
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from fft import arguments, parity, show
from fft.checkpoint import convert
from fft.data import trace
from fft.models import __main__ as models
from fft.parallel import ring_plan, window_plan
from fft.plan import __main__ as plan
from fft.plan import measure, validate
from fft.quickstart import __main__ as quickstart
from fft.quickstart.chat import __main__ as quickstart_chat
from fft.quickstart.chat import inputs, scores
from fft.quickstart.vision import __main__ as quickstart_vision
from fft.report import __main__ as report
from fft.serve import batch_infer, server
from fft.text import convert_tokenizer
from spark_jobs import cli

PAGE = Path(__file__).with_suffix(".md")

_TITLE = """# The flags of all commands

Written by `make docs` from the commands' own parsers; `--help` says the same and shows examples. Every flag of the
trainer may also stand in a YAML file (`--config`) under its name without dashes; the command line wins.
"""

#: What makes each command's parser, in the order of the page.
_PARSERS: tuple[Callable[[], argparse.ArgumentParser], ...] = (
    cli.tokenize_parser,
    cli.shuffle_parser,
    cli.repartition_parser,
    cli.generate_parser,
    arguments.build_parser,
    parity.build_parser,
    models.build_parser,
    trace.build_parser,
    report.build_parser,
    show.build_parser,
    plan.build_parser,
    measure.build_parser,
    validate.build_parser,
    convert.build_parser,
    convert_tokenizer.build_parser,
    batch_infer.build_parser,
    server.build_parser,
    ring_plan.build_parser,
    window_plan.build_parser,
    quickstart.build_parser,
    quickstart_vision.build_parser,
    quickstart_chat.build_parser,
    inputs.build_parser,
    scores.build_parser,
)

#: Groups that argparse makes by itself.
_UNTITLED = ("positional arguments", "options")


def page() -> str:
    """The whole page."""
    sections = [_command(make()) for make in _PARSERS]
    return "\n".join([_TITLE, *sections])


def _command(parser: argparse.ArgumentParser) -> str:
    """A command's section: what it is for, then its flags by topic."""
    what, _, _ = (parser.description or "").partition("\n\n")
    text = f"## {parser.prog}\n\n{_wrapped(what)}\n\n"
    theirs = _names(arguments.build_parser()._actions)
    inherits = theirs < _names(parser._actions)
    if inherits:
        text += "Takes all flags of the trainer, and:\n\n"
    for group in parser._action_groups:
        own = [action for action in group._group_actions if not (inherits and theirs.issuperset(_names([action])))]
        items = [_item(action) for action in own if action.dest != "help" and action.help != argparse.SUPPRESS]
        if items and group.title not in _UNTITLED:
            text += f"\n### {group.title}\n\n"
        text += "".join(items)
    return text


def _names(actions: Iterable[argparse.Action]) -> set[str]:
    return {name for action in actions for name in (*action.option_strings, action.dest)}


def _item(action: argparse.Action) -> str:
    """A flag's item: its names, what value it takes, whether it must be given, and what it means."""
    *short, name = action.option_strings or [""]
    value = str(action.metavar or (action.dest.upper() if name else action.dest))
    if action.nargs == 0:
        value = ""
    elif action.choices:
        value = f"{{{','.join(action.choices)}}}"
    elif action.nargs == "+":
        value += " ..."
    names = ", ".join(f"`{text}`" for text in (*short, f"{name} {value}".strip()))
    required = " (required)" if action.required else ""
    return _wrapped(f"- {names}{required}: {(action.help or '') % vars(action)}", "  ") + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
