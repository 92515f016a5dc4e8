"""From conversations to a small chat model that follows them: ``python -m fft.quickstart.chat``."""

import argparse
from collections.abc import Mapping, Sequence

from fft.console import say
from fft.errors import run_cli
from fft.quickstart import results
from fft.quickstart.chat.plan import BASE_CONFIG, CONFIG, ChatFolders, chat_stages
from fft.quickstart.chat.scores import score_page
from fft.quickstart.commands import check_place, finished_stages, quickstart_parser
from fft.quickstart.stages import Record

#: Share of the held-out orders that the fine-tuned model must answer rightly.
WANTED = 0.95

_EXAMPLES = f"""examples:
  # everything, in runs/quickstart-chat; a second call reuses what is finished
  python -m fft.quickstart.chat

  # short trainings, elsewhere (nothing will be right, which it says with exit code 1)
  python -m fft.quickstart.chat --output /tmp/chat --max_steps 20

--max_steps is for both trainings, of the base model ({BASE_CONFIG}), too.
docs/first-fine-tune.md has the same steps by hand.
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    return quickstart_parser(
        "fft.quickstart.chat",
        CONFIG,
        "Train a small chat model that repeats what it hears, fine-tune it on conversations with an adapter so that it "
        "answers orders with a list, merge, and ask both about orders that were held out.",
        _EXAMPLES,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary; 1 if fewer than :data:`WANTED` of the orders are answered rightly.

    Raises :class:`UserError` outside a checkout, when the output folder holds something else, and when a stage fails.
    """
    args = build_parser().parse_args(argv)
    folders = ChatFolders(args.output.resolve())
    check_place(folders, CONFIG)
    records = finished_stages(chat_stages(folders, args.max_steps), folders)
    if records is None:
        return 130
    print(_page(folders, records))
    right, asked = (records["after"].facts[name] for name in ("right", "asked"))
    if right < WANTED * asked:
        say(
            f"error: {right} of {asked} held-out orders are answered rightly, not {WANTED:.0%}: the model learned too "
            "little; train for more --max_steps."
        )
        return 1
    return 0


def _page(folders: ChatFolders, records: Mapping[str, Record]) -> str:
    trained = {"base": folders.base_run, "adapter": folders.output / "run"}
    losses = {name: results.read_metrics(run / "metrics.jsonl") for name, run in trained.items()}
    work = {name: found.course for name, found in losses.items()}
    work |= {name: "{right} of {asked} right".format(**records[name].facts) for name in ("before", "after")}
    lines = results.stage_lines([(name, record.seconds, work.get(name, "")) for name, record in records.items()])
    pages = [score_page(path) for path in (folders.before, folders.after)]
    return "\n".join([*lines, "", *pages, "", f"model: {folders.model}", f"adapter: {folders.adapter}"])


if __name__ == "__main__":
    run_cli(main)
