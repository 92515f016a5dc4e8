"""What a first fine-tuning needs, made from nothing: ``python -m fft.quickstart.chat.inputs``."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fft.console import say
from fft.data.owner import atomic_folder
from fft.errors import Parser, UserError, positive, run_cli
from fft.files import copy_file
from fft.quickstart.chat import orders
from fft.quickstart.commands import ROOT, check_checkout
from fft.quickstart.tokenizer import CHATML, train_tokenizer

MODEL = "conf/models/llama-chat-1m.json"
#: The model's directory before it has weights, beside the conversations.
START = "start"
#: The first ids; the config names that which ends a turn.
_SPECIAL = ("<|im_end|>", "<|im_start|>")


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = Parser(
        prog="python -m fft.quickstart.chat.inputs",
        description="Write conversations of a shop that repeats orders (talk.jsonl) and of one that answers with lists "
        "(chats.jsonl, validation.jsonl), orders that are in none of them (held-out.jsonl), and a small model's config "
        "and tokenizer (start/).",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--talks", type=positive, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument("--chats", type=positive, default=3000, metavar="N", help="default: %(default)s")
    parser.add_argument("--held_out", type=positive, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is said (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files. Raises :class:`UserError` outside a checkout, and for files that are there without
    ``--overwrite``."""
    args = build_parser().parse_args(argv)
    check_checkout(MODEL)
    if not args.overwrite and (args.output / orders.CHATS).exists():
        raise UserError(f"{args.output / orders.CHATS} exists: name another folder, or give --overwrite.")
    args.output.mkdir(parents=True, exist_ok=True)
    orders.write_conversations(args.output, args.talks, args.chats, args.held_out, args.seed)
    entries = write_start(ROOT / MODEL, orders.all_said(args.output), args.output / START)
    say(f"{args.output}: {args.talks:,} and {args.chats:,} conversations, {args.held_out:,} held out; {entries} tokens")
    return 0


def write_start(config: Path, texts: Iterable[str], output: Path) -> int:
    """Make the directory of a chat model without weights of a ``config``, with a tokenizer that ``texts`` train;
    returns how many entries that has. ``output`` appears whole or not at all."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(texts, settings["vocab_size"], _SPECIAL)
    tokenizer.chat_template = CHATML
    with atomic_folder(output) as staging:
        tokenizer.save_pretrained(str(staging))
        copy_file(config, staging / "config.json")
    return len(tokenizer)


if __name__ == "__main__":
    run_cli(main)
