"""``python -m fft.plan.measure``: a file of ``conf/hardware``'s form for the machine that it runs on."""

from collections.abc import Sequence
from pathlib import Path

from fft.errors import Parser, check_new_file, run_cli

_ABOUT = """\
Measure the machine that this runs on, and write a file for --hardware of fft.plan. Under a launcher all ranks measure
at the same time, as they would train, and the links between them are measured, too: those between machines by a rank
or more on each.

    python -m fft.plan.measure -o mine.yaml
    torchrun --nproc_per_node 8 -m fft.plan.measure -o mine.yaml
    torchrun --nnodes 2 --node_rank N --nproc_per_node 8 --master_addr ADDRESS -m fft.plan.measure -o mine.yaml

Nothing else should run there meanwhile. It takes a minute, and more on slow links.
"""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m fft.plan.measure", description=_ABOUT)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="a YAML file, by rank 0")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Raises :class:`UserError` where the file is not to be written. Collective."""
    args = build_parser().parse_args(argv)
    check_new_file(args.output, args.overwrite)
    # Not before: --help need not wait for torch.
    from fft.plan.measured import measure_to

    measure_to(args.output)
    return 0


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
