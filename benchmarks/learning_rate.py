"""Which learning rate? The fine-tuning of the chat quickstart at many rates, with adapters and with all weights.

    make quickstart-chat                    the base model and the conversations, once
    python -m benchmarks.learning_rate      below runs/quickstart-chat, a few minutes on two cores

Prints, for each rate, the validation loss before, at its lowest and at the end, and how many of the held-out orders the
model at the end answers rightly.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fft.console import format_table
from fft.quickstart.chat import orders
from fft.quickstart.chat.plan import CONFIG
from fft.quickstart.chat.scores import count_right, read_answered
from fft.quickstart.commands import ROOT

_KINDS = {"adapter, rank 16": ("--lora_dim", "16"), "all weights": ("--lora_dim", "0")}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=ROOT / "runs" / "quickstart-chat", metavar="DIR")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--max_steps", type=int, default=50)
    args = parser.parse_args(argv)
    if not (args.inputs / "base" / "config.json").is_file():
        parser.error(f"{args.inputs} has no base model: make quickstart-chat.")
    rows = [
        (kind, f"{rate:g}", *tried(args.inputs, rate, args.max_steps, flags))
        for kind, flags in _KINDS.items()
        for rate in args.rates
    ]
    print(format_table(("trained", "rate", "loss before", "lowest", "at the end", "right"), rows))


def tried(inputs: Path, rate: float, steps: int, flags: Sequence[str]) -> tuple[str, str, str, str]:
    """Validation losses of a training, and the share of orders that are answered rightly."""
    folder = Path(tempfile.mkdtemp(prefix="fft-rate-"))
    output, answers = folder / "output", folder / "answers.jsonl"
    run(
        *("fft.train", "--config", CONFIG, "--model", inputs / "base", "--train_data", inputs / orders.CHATS),
        *("--eval_data", inputs / orders.VALIDATION, "--output_dir", output, "--checkpoint", folder / "run"),
        *("--learning_rate", rate, "--max_steps", steps, "--eval_steps", max(1, steps // 10), *flags),
    )
    adapter = ("--lora", output) if (output / "adapter_config.json").is_file() else ()
    run(
        *("fft.serve.batch_infer", "--model", inputs / "base" if adapter else output, *adapter),
        *("--input", inputs / orders.ASKED, "--prompt_key", "messages", "--output", answers),
        *("--max_new_tokens", 48, "--batch_size", 50),
    )
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [told["eval_loss"] for told in map(json.loads, lines) if "eval_loss" in told]
    rows = read_answered(answers)
    shutil.rmtree(folder)
    return (*(f"{loss:.3f}" for loss in (losses[0], min(losses), losses[-1])), f"{count_right(rows)} of {len(rows)}")


def run(*command: object) -> None:
    """Run ``python -m command``, silently unless it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.args}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
