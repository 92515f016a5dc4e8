"""A command in this process: one of its own would import for eight seconds what is imported here already."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """A command's exit code, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run_here(cli: Callable[[], None], *words: object) -> Ended:
    """What becomes of a command, whose console entry point is ``cli``, with these words behind its name."""
    before, code = sys.argv, 0
    sys.argv = [cli.__module__, *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())
