"""``python -m fft.plan``: which layout, how fast, how much memory, on which machines."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from fft.errors import Parser, UserError, check_new_file, positive, run_cli
from fft.files import write_atomically

_ABOUT = """\
Find the fastest layouts of a model on machines that a file describes, without a device, weights or data.

    python -m fft.plan --model conf/models/qwen2.5-14b.json --hardware conf/hardware/8xa100-40g-pcie.yaml \\
        --ranks 64 --seq_len 2048 --tokens_per_step 4194304

docs/planner.md says how it predicts, and how right that was for what others have published.
"""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m fft.plan", description=_ABOUT)
    parser.add_argument("--model", required=True, metavar="PATH", help="a model directory, or a config.json")
    parser.add_argument("--hardware", required=True, type=Path, metavar="FILE", help="a file as in conf/hardware")
    parser.add_argument("--ranks", required=True, type=positive, metavar="N", help="devices")
    parser.add_argument("--seq_len", type=positive, default=4096, metavar="N", help="tokens of a row (default: 4096)")
    parser.add_argument(
        "--tokens_per_step", type=positive, default=1 << 22, metavar="N", help="of all replicas (default: 4194304)"
    )
    parser.add_argument("--train_tokens", type=float, default=0.0, metavar="N", help="tells days, and what they cost")
    parser.add_argument("--best", type=positive, default=10, metavar="N", help="layouts that are shown (default: 10)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the best as settings for fft.train --config")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="a step of the best as a picture (SVG)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--compare", metavar="LINKS", help="the same devices on links of conf/hardware/links.yaml, such as nvlink,pcie"
    )
    parser.add_argument("--price", type=float, default=0.0, metavar="X", help="of a device and hour: what tokens cost")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is asked for. Raises :class:`UserError` for models, machines and numbers that cannot be planned."""
    parser = build_parser()
    args = parser.parse_args(argv)
    from fft.plan.compare import links_table, price_table
    from fft.plan.found import find_layouts

    for path in (args.write, args.timeline):
        check_new_file(path, args.overwrite)
    if not (isfinite(args.price) and args.price >= 0):
        raise UserError(f"--price {args.price:g}: it must be a number, of a device and hour.")
    names = ("ranks", "seq_len", "tokens_per_step", "train_tokens", "best")
    with parser.naming_flags():
        found = find_layouts(args.model, args.hardware, **{name: getattr(args, name) for name in names})
    print(found)
    if args.compare:
        print(f"\n{links_table(found.job, found.machine, args.ranks, args.compare.split(','), args.best)}")
    if args.price:
        print(f"\n{price_table(found.job, found.machine, args.ranks, args.price, args.train_tokens)}")
    if args.write:
        write_atomically(args.write, found.settings())
    if args.timeline:
        found.plot().save(args.timeline)
    return 0


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
