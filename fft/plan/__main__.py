"""``python -m fft.plan``: which layout, how fast, how much memory, on which machines."""

from collections.abc import Sequence
from pathlib import Path

from fft.errors import Parser, UserError, positive, run_cli
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
    args = build_parser().parse_args(argv)
    from fft.plan.compare import links_table, price_table
    from fft.plan.hardware import read_machine
    from fft.plan.ours import read_job
    from fft.plan.search import Search
    from fft.plan.timeline import timeline_svg
    from fft.plan.told import best_table, flags_text, layout_name, settings_text, time_table

    for path in (args.write, args.timeline):
        if path is not None and path.exists() and not args.overwrite:
            raise UserError(f"{path} exists: give --overwrite to replace it, or another name.")
    if args.tokens_per_step % args.seq_len:
        raise UserError(f"--tokens_per_step {args.tokens_per_step} must be a multiple of --seq_len {args.seq_len}.")
    machine, job = read_machine(args.hardware), read_job(args.model, args.seq_len, args.tokens_per_step)
    search = Search(job, machine, args.ranks)
    plans = search.best(args.best)
    if not plans:
        raise UserError(
            f"no layout of {args.ranks} x {machine.device.name} has the memory for {args.model} with rows of "
            f"{args.seq_len}: give more --ranks, or a --tokens_per_step that divides by more of them."
        )
    print(f"{job.name}, {search.shape(False).parameters / 1e9:.2f} B parameters, {args.ranks} x {machine.device.name}")
    print(f"{search.seen:,} layouts, {search.tried:,} of them played through\n")
    print(best_table(search, plans, args.train_tokens))
    print(f"\nwhere the time goes, %\n{time_table(plans)}")
    print(f"\nthe first: {flags_text(job, plans[0])}")
    if args.compare:
        print(f"\n{links_table(job, machine, args.ranks, args.compare.split(','), args.best)}")
    if args.price:
        print(f"\n{price_table(job, machine, args.ranks, args.price, args.train_tokens)}")
    if args.write:
        write_atomically(args.write, settings_text(search, plans[0]))
    if args.timeline:
        title = f"{job.name}, {args.ranks} x {machine.device.name}: {layout_name(plans[0])}"
        write_atomically(args.timeline, timeline_svg(plans[0].run, title))
    return 0


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
