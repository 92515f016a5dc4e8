"""Train a model on token tables: ``deepspeed fft/train.py``, ``torchrun fft/train.py`` or ``python -m fft.train``.

``--help`` lists the flags. See :mod:`fft.training.trainer` for what a run does.
"""

import os
import sys

if __name__ == "__main__":
    # As a script, this folder is the first place Python looks for modules, and its names (data, models, parallel, ...)
    # would shadow other packages'. The repository's root takes its place.
    _HERE = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _HERE]
    if os.path.dirname(_HERE) not in sys.path:
        sys.path.insert(0, os.path.dirname(_HERE))

from fft.arguments import build_parser, parse_arguments
from fft.errors import run_cli


def main() -> int:
    """Parse, check what can be checked without starting anything, then train."""
    arguments = parse_arguments()
    from fft.data.views import naming_places  # not before: --help need not wait for pyarrow

    # Texts are read as the jobs read them, whose errors name parameters.
    with build_parser().naming_flags(), naming_places():
        if arguments.layout == "auto":
            from fft.plan.auto import with_best_layout

            world = int(os.environ.get("WORLD_SIZE", "1"))
            first = int(os.environ.get("RANK", "0")) == 0
            arguments = with_best_layout(arguments, (arguments.dry_run and arguments.ranks) or world, first)
        if arguments.dry_run:
            from fft.planning.dry_run import dry_run

            return dry_run(arguments)
        from fft.training.trainer import train

        return train(arguments)


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
