"""From drawn pictures to a small model that answers questions about others: ``python -m fft.quickstart.vision``."""

import argparse
from collections.abc import Mapping, Sequence

from fft.console import say
from fft.errors import run_cli
from fft.quickstart import results
from fft.quickstart.commands import check_place, finished_stages, quickstart_parser, spark_rate
from fft.quickstart.stages import Record
from fft.quickstart.vision.plan import CONFIG, VisionFolders, vision_stages
from fft.quickstart.vision.scores import Score, read_answers, table

#: Share of the questions by which the model that sees must be ahead of who does not.
LEAD = 0.2

_EXAMPLES = """examples:
  # everything, in runs/quickstart-vision; a second call reuses what is finished
  python -m fft.quickstart.vision

  # a short training, elsewhere (it will hardly see anything, and says so with exit code 1)
  python -m fft.quickstart.vision --output /tmp/vision --max_steps 20
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    return quickstart_parser(
        "fft.quickstart.vision",
        CONFIG,
        "Draw pictures of coloured shapes, make a table of chats about them with Spark, train a small Qwen2-VL, and "
        "ask it about pictures that it has not seen.",
        _EXAMPLES,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary; 1 if the model is not :data:`LEAD` ahead of who does not see.

    Raises :class:`UserError` outside a checkout, when the output folder holds something else, and when a stage fails.
    """
    args = build_parser().parse_args(argv)
    folders = VisionFolders(args.output.resolve())
    check_place(folders, CONFIG)
    records = finished_stages(vision_stages(folders, args.max_steps), folders)
    if records is None:
        return 130
    found = [Score(**facts) for facts in records["report"].facts["scores"]]
    print(_page(folders, records, found))
    if found[-1].lead < LEAD:
        say(
            f"error: the model is only {found[-1].lead:.1%} of the questions ahead of who does not see the pictures, "
            f"not {LEAD:.0%}: it learned too little to see; train for more --max_steps."
        )
        return 1
    return 0


def _page(folders: VisionFolders, records: Mapping[str, Record], found: Sequence[Score]) -> str:
    drawn, losses = records["pictures"].facts, results.read_metrics(folders.output / "run" / "metrics.jsonl")
    tokens, rate = spark_rate(folders.tokens)
    answers = len(read_answers(folders.answers))
    work = {
        "pictures": f"{drawn['pictures']:,} with {drawn['questions']:,} questions, "
        f"{drawn['held_out_pictures']:,} others with {drawn['held_out_questions']:,}",
        "tokenizer": f"{records['tokenizer'].facts['entries']:,} entries",
        "tokenize": f"{tokens:,} tokens, {rate:,.0f} tokens/s",
        "train": losses.course,
        "answer": f"{answers:,} questions, {answers / records['answer'].seconds:,.1f} a second",
        "report": "",
    }
    lines = results.stage_lines([(name, record.seconds, work[name]) for name, record in records.items()])
    return "\n".join([*lines, "", table(found), "", f"model: {folders.model}", f"picture: {folders.sheet}"])


if __name__ == "__main__":
    run_cli(main)
