"""The one kind of error a user is meant to read, and the one place that prints it."""

import os
import sys
from collections.abc import Callable

#: Exit code of a command that refused its input, as argparse uses for bad flags.
EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong, where, and the remedy."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit with its code; a :class:`UserError` becomes one line on stderr and exit code 2.

    Every rank of a distributed job meets the same bad input, so only rank 0 prints unless the error says
    otherwise (``error.every_rank = True``, for faults that one rank alone can see).
    """
    try:
        code = main() or 0
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0 or getattr(error, "every_rank", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except BrokenPipeError:
        code = 1
    sys.exit(code)
