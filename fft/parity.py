"""Does a layout compute what one process would? A user's own layout and data, on a shrunken copy of the model.

python -m fft.parity --config conf/mine.yaml
python -m fft.parity --config conf/mine.yaml --steps 5 --ranks 8 --pipe_parallel_size 4 --seq_len 256   # quicker

The trainer takes a few steps in fp32 with the layout, data, optimizer and schedule that the flags say; a plain loop of
transformers and ``torch.optim.AdamW`` in this process takes the same steps, one document at a time. Losses, gradient
norms, gradients (through AdamW's first moments, their running mean) and final weights are compared. Nothing of the
user's is written. Flags count as they are given, but for outputs, evaluation, saving and ``--dtype``; the learning rate
is at least 1e-3 and the warm-up at most half of the steps, so that weights move; accumulation is at most 4; AdamW's
epsilon is at least 1e-5, so that the rounding of gradients near zero is not blown up. The run uses the machine's
accelerators, if it has some (``DS_ACCELERATOR=cpu`` keeps it off them). The exit code is 1 where the two differ.
"""

from collections.abc import Sequence

from fft import arguments
from fft.errors import Parser, UserError, run_cli


def build_parser() -> Parser:
    """The trainer's flags, and the command's own."""
    parser = arguments.build_parser()
    parser.prog, parser.description, parser.epilog = "python -m fft.parity", __doc__, None
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps to compare (default: 3)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns 0 when all is within the tolerances, 1 when not.

    Raises :class:`UserError` for settings that cannot be run, and when the run fails.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    steps = given.pop("steps")
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1.")
    # Not before: --help need not wait for torch.
    from fft.parity_run import compare

    with parser.naming_flags():
        return compare(given, steps)


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
