"""Write a Hugging Face model directory from a checkpoint, without launching a trainer; holds one shard in memory.

python -m fft.checkpoint.convert runs/run OUT --tag step-500
python -m fft.checkpoint.convert runs/run OUT --dtype fp32           # from the optimizer's fp32 masters
python -m fft.checkpoint.convert Qwen3-8B OUT --lora adapter         # merge an adapter in PEFT's format
python -m fft.checkpoint.convert runs/lora OUT                       # a run's adapter (masters), merged into its model
python -m fft.checkpoint.convert runs/old/global_step500 OUT --model Qwen3-8B   # DeepSpeed's layer files
python -m fft.checkpoint.convert InternVL2-8B OUT                    # an original, as the internvl of transformers
python -m fft.checkpoint.convert runs/run OUT --like InternVL2-8B    # and back
"""

import argparse
import math
from collections.abc import Sequence

from fft.console import say
from fft.errors import Parser, UserError, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    title, examples = (__doc__ or "").split("\n\n")
    parser = Parser(prog="python -m fft.checkpoint.convert", description=title, epilog=f"examples:\n{examples}")
    parser.add_argument(
        "source", metavar="DIR", help="run folder, checkpoint, model directory, or DeepSpeed checkpoint"
    )
    parser.add_argument("output", metavar="OUT", help="model directory to write")
    parser.add_argument("--tag", help="which checkpoint of a run folder, or best (default: the newest)")
    parser.add_argument("--model", metavar="DIR", help="where config and tokenizer are (default: with the weights)")
    parser.add_argument("--like", metavar="DIR", help="write as this original is, with its config, code and tokenizer")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="type to write (default: as stored)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR",
        help="adapter to merge, as PEFT saves them; may be given several times: what they add is summed",
    )
    parser.add_argument("--max_shard_size", type=float, default=5.0, metavar="GB", help="of a file (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Raises :class:`UserError` for what it cannot read or must not replace."""
    args = build_parser().parse_args(argv)
    _check(args)
    output = args.output
    # Not before: --help need not wait for torch.
    from fft.checkpoint.card import card_beside
    from fft.checkpoint.conversion import convert, merged, open_source
    from fft.checkpoint.original_form import write_like
    from fft.data.views import naming_places, view

    with naming_places():
        source, model, where = open_source(args.source, args.tag, args.model and view(args.model), args.dtype)
        if args.lora:
            where, *more = map(view, args.lora)
            source = merged(source, where, args.dtype, model, *more)
        card = card_beside(where) if len(args.lora) < 2 else None  # which speaks of one
        limit = int(args.max_shard_size * 1e9)
        if args.like:
            tensors = write_like(source, view(args.like), output, args.dtype, limit, card)
        else:
            tensors = convert(source, model, output, args.dtype, limit, card)
    say(f"{tensors} tensors written to {output}")


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is read. Raises :class:`UserError`, also for what must not be replaced."""
    # Not before: --help need not wait for Arrow.
    from fft.checkpoint import places
    from fft.data.replaceable import MODEL, check_replaceable, names_in

    output = args.output
    if places.is_a_file(output):
        raise UserError(f"{output} is a file: name a folder.")
    if places.holds_something(output) and not args.overwrite:
        raise UserError(f"{output} exists and is not empty: choose another folder or add --overwrite.")
    if (lost := places.checkpoint_replaced(output)) is not None:
        raise UserError(f"{output} would replace or change the checkpoint {lost}: choose another folder.")
    if not 0 < args.max_shard_size < math.inf:
        raise UserError(f"--max_shard_size {args.max_shard_size} must be more than 0.")
    for path in filter(None, (args.source, args.model, *args.lora, args.like)):
        if places.lies_in(path, output):
            raise UserError(f"{output} would replace {path}, which is read: choose another folder.")
    check_replaceable(output, output, MODEL, names_in(args.like))


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
