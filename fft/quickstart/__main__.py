"""From the standard library's sources to a small trained model: ``python -m fft.quickstart``."""

import argparse
import json
from collections.abc import Mapping, Sequence

from fft.console import say
from fft.errors import run_cli
from fft.quickstart import results
from fft.quickstart.commands import check_place, finished_stages, quickstart_parser, spark_rate
from fft.quickstart.places import Lake, Place, fetched
from fft.quickstart.plan import CONFIG, METRICS, Folders, build_stages
from fft.quickstart.stages import Record

#: Nats a token by which the model must beat the unigram baseline.
MARGIN = 1.0

_EXAMPLES = """examples:
  # everything, in runs/quickstart; a second call reuses what is finished
  python -m fft.quickstart

  # every path in a store, whose credentials are in the environment
  python -m fft.quickstart --lake s3://bucket/quickstart

  # a short training, elsewhere (it will not beat the baseline, and says so with exit code 1)
  python -m fft.quickstart --output /tmp/quickstart --max_steps 20
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = quickstart_parser(
        "fft.quickstart",
        CONFIG,
        "Collect Python's own sources, tokenize, shuffle and pack them with Spark, train a small Llama on two pipeline "
        "stages, and let it write.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--lake", metavar="URL", help="where everything lies instead, s3://bucket/prefix; --output has notes of stages"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary; 1 if the model did not beat the unigram baseline by :data:`MARGIN`.

    Raises :class:`UserError` outside a checkout, when the output folder holds something else, and when a stage fails.
    """
    args = build_parser().parse_args(argv)
    folders = Folders(args.output.resolve())
    if args.lake is not None:
        folders = Folders(Lake.at(args.lake), args.output.resolve())
    check_place(folders, CONFIG)
    records = finished_stages(build_stages(folders, args.max_steps), folders)
    if records is None:
        return 130
    with fetched(folders.run / METRICS) as metrics:
        losses = results.read_metrics(metrics)
    baseline, reached = records["report"].facts["baseline"], losses.validation[-1][1]
    print(_summary(folders, records, losses, baseline))
    if reached > baseline - MARGIN:
        say(
            f"error: the validation loss ended at {reached:.3f}, not {MARGIN:g} nat below the unigram baseline of "
            f"{baseline:.3f}: the model learned too little; train for more --max_steps."
        )
        return 1
    return 0


def _summary(folders: Folders, records: Mapping[str, Record], losses: results.Losses, baseline: float) -> str:
    sources, tokenizer = records["corpus"].facts, records["tokenizer"]
    with fetched(folders.completions) as path:
        completions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    work = {
        "corpus": f"{sources['documents']:,} documents, {sources['bytes'] / 1e6:.1f} MB, "
        f"{sources['undecodable']} left out as no UTF-8",
        "tokenizer": f"{tokenizer.facts['entries']:,} entries, {sources['bytes'] / 1e6 / tokenizer.seconds:.1f} MB/s",
        "tokenize": _rate(folders.tokens),
        "shuffle": _rate(folders.shuffled / "train", folders.shuffled / "validation"),
        "repartition": _rate(folders.packed / "train", folders.packed / "validation"),
        "train": losses.rate,
        "generate": f"{len(completions)} prompts",
        "report": "",
    }
    return results.summary(
        {split: spark_rate(folders.packed / split)[0] for split in ("train", "validation")},
        [(name, record.seconds, work[name]) for name, record in records.items()],
        losses,
        baseline,
        [(line["prompt"], line["text"]) for line in completions],
        {"model": folders.model, "picture": folders.picture},
    )


def _rate(*tables: Place) -> str:
    """Tokens of tables that one job wrote, and its rate on the first of them."""
    found = [spark_rate(table) for table in tables]
    return f"{sum(tokens for tokens, _ in found):,} tokens, {found[0][1]:,.0f} tokens/s"


if __name__ == "__main__":
    run_cli(main)
