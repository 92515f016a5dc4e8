"""Answer a file of prompts with a model: ``python -m fft.serve.batch_infer``. ``--help`` shows how."""

from collections.abc import Sequence

from fft.errors import Parser, run_cli
from fft.serve.engines import add_engine_flags
from fft.serve.prompt_flags import CHAT, add_image_flags
from fft.serve.sampling import add_sampling_flags
from fft.serve.stopping import ending_in_order

_EXAMPLES = """examples:
  # one prompt a line, greedy
  python -m fft.serve.batch_infer --model runs/model --input prompts.txt --output out.jsonl

  # JSON lines with the key "question"; the other fields travel along to the output
  python -m fft.serve.batch_infer --model Qwen3-8B --input test.jsonl --prompt_key question --output out.jsonl \\
      --max_new_tokens 512 --temperature 0.7 --top_p 0.9 --seed 1

  # conversations of a Delta table, four samples each, as parquet; what is malformed is kept aside
  python -m fft.serve.batch_infer --model Qwen3-8B --input lake/chats@v12 --output samples.parquet \\
      --n 4 --temperature 1 --on_error quarantine

Every row of the output holds prompt, text, finish_reason ("stop" or "length") and the input's other fields, in the
input's order. A run that was interrupted goes on where it was when the same command is given again.
"""


def build_parser() -> Parser:
    """Flags of the command."""
    parser = Parser(
        prog="python -m fft.serve.batch_infer",
        description="Answer every prompt of a file with a Hugging Face model.",
        epilog=_EXAMPLES,
        common=("output", "prompt_key", "resume", "overwrite", "max_new_tokens", "temperature", "n", "engine", "lora"),
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument(
        "--input",
        "--prompt_file",
        dest="inputs",
        required=True,
        nargs="+",
        metavar="PATH",
        help="prompts: files of JSON lines, text (one a line) or parquet, folders, Delta tables (PATH@vN), URLs",
    )
    parser.add_argument(
        "--output",
        "--output_file",
        default="result.jsonl",
        metavar="FILE",
        help="JSON lines, or .parquet, to write (default: %(default)s)",
    )
    parser.add_argument("--prompt_key", default="prompt", help="key or column of the prompt (default: %(default)s)")
    parser.add_argument(
        "--chat", choices=CHAT, default="auto", help="a text is a user's turn (auto: where there is a chat template)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system turn of every chat that has none")
    parser.add_argument(
        "--on_error",
        choices=("fail", "quarantine"),
        default="fail",
        help="a malformed prompt ends the run before it begins (default), or gets a row with its error",
    )
    parser.add_argument(
        "--resume", choices=("auto", "no"), default="auto", help="auto: go on with what an interrupted run has left"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    add_image_flags(parser)
    add_sampling_flags(parser)
    add_engine_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check all, generate, write. Raises :class:`UserError` for what cannot be read, written or answered."""
    parser = build_parser()
    with parser.naming_flags(), ending_in_order():
        args = parser.parse_args(argv)
        from fft.serve.answer_file import answer_file  # not before: --help need not wait for Arrow

        answer_file(args)


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
