"""The jobs' command lines: flags, their meaning, and one call each."""

from collections.abc import Callable, Sequence

import spark_jobs
from fft.errors import Parser, UserError, positive
from fft.serve.engines import add_engine_flags
from fft.serve.prompt_flags import add_image_flags
from fft.serve.sampling import add_sampling_flags
from spark_jobs.cli_values import fraction, named_weights
from spark_jobs.parameters import CHOICES
from spark_jobs.record_flags import add_keep, add_record_flags, add_row_flags

#: Flags that ``--help`` explains, besides those that have to be given; ``--help_all`` explains all.
_COMMON = (
    *("output", "overwrite", "report", "format", "task", "text_key", "max_len", "on_error"),
    *("seed", "weights", "weight_by", "dedup", "holdout", "pack", "prompt_key", "n", "temperature", "max_new_tokens"),
)


def tokenize_parser() -> Parser:
    """Flags of ``spark_jobs/tokenize.py``."""
    parser = _parser(
        "tokenize",
        "Turn documents into a token table: parquet rows of input_ids and doc_ids, one a document.",
        """
  # JSON lines with the keys text and (optional) id
  spark-submit spark_jobs/tokenize.py -i corpus.jsonl -o runs/tokens --tokenizer runs/tokenizer

  # several inputs of other kinds, another key; what cannot be read is set aside
  spark-submit spark_jobs/tokenize.py -i books/ wiki.parquet -o runs/tokens --tokenizer Qwen3-8B \\
      --text_key content --on_error quarantine

  # conversations, one a line or parquet row, in any of the forms
  #   [{"system": "Be brief."}, {"user": "2+2?"}, {"assistant": "4"}]
  #   {"conversation": [{"user": "2+2?"}, {"assistant": "4"}, {"user": "3+3?"}, {"assistant": "6"}]}
  #   {"id": "a1", "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
  spark-submit spark_jobs/tokenize.py --task chat -i chats.jsonl -o runs/chats --tokenizer Qwen3-8B --max_len 8192

  # conversations with images: [{"user": ["What is on <image>?", "cat.jpg"]}, {"assistant": "A cat."}]
  spark-submit spark_jobs/tokenize.py --task chat -i dataset_vl.jsonl -o runs/chats --tokenizer Qwen2-VL-7B \\
      --image_path images --max_len 8192
""",
        "file(s) or folder(s): JSON lines (.jsonl, .json, also .gz, .zst), .parquet, or .txt with a blank line between "
        "documents; a Delta table (PATH@v3 is its version 3); the name of a catalog table; a URL that Spark can read",
        short=("-i",),
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder, a path or a URL"
    )
    parser.add_argument(
        "--task",
        choices=CHOICES["task"],
        default="pretrain",
        help="pretrain: every token is trained on (default); chat: conversations through the tokenizer's chat "
        "template, with labels on every assistant turn and its end-of-turn token alone; preference: pairs of such, "
        "chosen and rejected (docs/data-jobs.md)",
    )
    parser.add_argument("--text_key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--id_key", default="id", help="key or column of the id; without one, a hash of the text")
    add_row_flags(parser)
    parser.add_argument(
        "--eos",
        choices=CHOICES["eos"],
        default="auto",
        help="end-of-sequence token after each document: auto = if the tokenizer has one (default), always = it must",
    )
    add_record_flags(parser)
    return parser


def run_tokenize(argv: Sequence[str] | None = None) -> None:
    """``spark_jobs/tokenize.py``."""
    _run(tokenize_parser(), argv, "tokenize_table")


def shuffle_parser() -> Parser:
    """Flags of ``spark_jobs/shuffle.py``."""
    parser = _parser(
        "shuffle",
        "Mix the rows of all tables into one global order that depends on the seed alone.",
        """
  # one table, one row in a hundred held out: runs/shuffled/train and runs/shuffled/validation
  spark-submit spark_jobs/shuffle.py -i runs/tokens -o runs/shuffled --holdout 0.01

  # every table below a folder, another order
  spark-submit spark_jobs/shuffle.py -i runs/datasets -o runs/shuffled --seed 7 --num_block 64

  # a mixture of the tables runs/datasets/web and runs/datasets/books, no content twice
  spark-submit spark_jobs/shuffle.py -i runs/datasets -o runs/mixed --weights web=0.7,books=2 --dedup

  # tables by names of their own, which documents keep in the column dataset
  spark-submit spark_jobs/shuffle.py -i web=lake/cc-2026 books=lake/gutenberg -o runs/mixed
""",
        "token table(s), or a folder of them; names of catalog tables; NAME=TABLE calls one otherwise than its folder",
    )
    add_keep(parser, "columns of the tables")
    parser.add_argument("--seed", type=int, default=0, help="the order's seed (default: %(default)s)")
    parser.add_argument("-n", "--num_block", type=positive, help="files to write (default: from the tokens, 8 to 2048)")
    parser.add_argument(
        "--weights",
        type=named_weights,
        default={},
        metavar="NAME=W,...",
        help="how often rows of a table occur, by the name of its folder: 0.7 takes seven documents in ten, 2.5 all of "
        "them twice and half of them once more (default: 1); held-out rows occur once",
    )
    parser.add_argument(
        "--weight_by",
        choices=CHOICES["weight_by"],
        default="documents",
        help="documents: --weights say how often each occurs (default); tokens: they are the tables' shares of the "
        "mixture's tokens, of which it has as many as all tables together",
    )
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="leave out rows whose content occurred before, and training rows whose content is held out",
    )
    parser.add_argument(
        "--holdout",
        type=fraction,
        default=0.0,
        metavar="F",
        help="hold out this share of the documents, chosen by id; then -o holds the tables train and validation",
    )
    return parser


def run_shuffle(argv: Sequence[str] | None = None) -> None:
    """``spark_jobs/shuffle.py``."""
    _run(shuffle_parser(), argv, "shuffle_tables")


def repartition_parser() -> Parser:
    """Flags of ``spark_jobs/repartition.py``."""
    parser = _parser(
        "repartition",
        "Write n partitions of equal token count, their documents packed to rows of at most --max_len tokens.",
        """
  # packed rows for training; train and validation are both done if the input has them
  spark-submit spark_jobs/repartition.py -i runs/shuffled -o runs/packed --max_len 512

  # no unused position, documents cut anywhere, 64 files
  spark-submit spark_jobs/repartition.py -i runs/shuffled -o runs/packed --max_len 4096 --pack concat \\
      --num_partition 64

  # in place, and a picture of the result
  spark-submit spark_jobs/repartition.py -i runs/shuffled --max_len 4096 --overwrite --report runs/packed.html
""",
        "one token table, or a folder with the tables train and validation; the name of a catalog table",
        several=False,
    )
    parser.add_argument("--max_len", type=positive, required=True, help="tokens of a row at most")
    parser.add_argument(
        "--pack",
        choices=CHOICES["pack"],
        default="best-fit",
        help="best-fit: cut only documents longer than a row (default); concat: cut anywhere, fill every row; "
        "none: keep rows, cut those that are too long",
    )
    parser.add_argument(
        "-n", "--num_partition", type=positive, help="files to write (default: from the tokens, 4 to 2048)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of rows (default: %(default)s)")
    return parser


def run_repartition(argv: Sequence[str] | None = None) -> None:
    """``spark_jobs/repartition.py``."""
    _run(repartition_parser(), argv, "repartition_table")


def generate_parser() -> Parser:
    """Flags of ``spark_jobs/generate.py``."""
    parser = _parser(
        "generate",
        "Answer the prompts of a table: rows of the prompts' columns, the answers, and the conversations that they "
        "make, which tokenize.py --task chat takes. One engine a worker; a job that was interrupted goes on when its "
        "command is given again.",
        """
  # JSON lines with the key prompt, or with conversations under messages
  spark-submit spark_jobs/generate.py -i prompts.jsonl -o runs/answers --model Qwen3-8B --max_new_tokens 512

  # eight samples of each question of a Delta table; workers have a Python of their own, with vLLM
  PYSPARK_DRIVER_PYTHON=.venv/bin/python PYSPARK_PYTHON=.venv-serve/bin/python \\
  spark-submit spark_jobs/generate.py -i lake/questions -o lake/samples --model Qwen3-8B --prompt_key question \\
      --n 8 --temperature 0.8 --on_error quarantine --format delta
""",
        "file(s) or folder(s) of prompts: JSON lines (.jsonl, .json, also .gz, .zst), .parquet, or .txt with a prompt "
        "a line; a Delta table (PATH@v3 is its version 3); the name of a catalog table; a URL of parquet or Delta",
        short=("-i",),
        tokens=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument(
        "--prompt_key",
        default="prompt",
        metavar="KEY",
        help="key or column of the prompts, texts or lists of turns (default: %(default)s); conversations may also "
        "stand under messages or conversation, or in the form of ShareGPT or Alpaca",
    )
    parser.add_argument(
        "--id_key",
        default="id",
        metavar="KEY",
        help="key or column of the id, on which a row's samples depend (default: %(default)s); else it is its place",
    )
    parser.add_argument(
        "--chat",
        choices=CHOICES["chat"],
        default="auto",
        help="whether a text is one user's turn; auto: where the model has a chat template (default)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system turn of conversations that have none")
    parser.add_argument(
        "--num_engine",
        type=positive,
        metavar="N",
        help="engines that work at a time (default: one on a local Spark; on a cluster, one for each task at once)",
    )
    parser.add_argument(
        "--on_error",
        choices=CHOICES["on_error"],
        default="fail",
        help="malformed rows end the job (default), or go to OUTPUT/_quarantine and are counted",
    )
    add_image_flags(parser)
    add_sampling_flags(parser)
    add_engine_flags(parser)
    return parser


def run_generate(argv: Sequence[str] | None = None) -> None:
    """``spark_jobs/generate.py``."""
    _run(generate_parser(), argv, "generate_table")


def _parser(
    name: str,
    what: str,
    examples: str,
    inputs: str,
    several: bool = True,
    short: tuple[str, ...] = ("-i", "-d"),
    tokens: bool = True,
) -> Parser:
    """What the jobs have in common, those that make ``tokens`` more than others. ``-d`` is how ``jllm`` calls the
    tables that it shuffles and repartitions."""
    parser = Parser(
        prog=f"spark-submit spark_jobs/{name}.py",
        description=what,
        epilog=f"examples:{examples}",
        common=_COMMON,
    )
    parser.add_argument(
        *short,
        "--input",
        required=True,
        nargs="+" if several else None,
        metavar="PATH",
        dest="inputs" if several else "input",
        help=inputs,
    )
    parser.add_argument(
        "-o",
        "--output",
        required=several,
        metavar="DIR",
        help="folder of the new table, a path or a URL (s3://...)"
        + (", or the name of a catalog table, CATALOG.SCHEMA.TABLE" if tokens else "")
        + ("" if several else " (default: replace the input, which takes --overwrite)"),
    )
    parser.add_argument(
        "--format",
        choices=CHOICES["format"],
        default=None if tokens else "parquet",
        help="of the new table (default: parquet"
        + ("; of a catalog table, what the catalog makes" if tokens else "")
        + "); delta needs no cluster support, only pip install deltalake",
    )
    if tokens:
        parser.add_argument(
            "--writer",
            choices=CHOICES["writer"],
            help="who writes: parts, the workers themselves (default for folders), or spark, Spark's own writer, which "
            "catalog tables take, and paths and URLs may (default for names of tables)",
        )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a table that is there; a Delta table gets a new version"
    )
    if tokens:
        parser.add_argument(
            "--report",
            metavar="FILE",
            help="also draw lengths, mixture and packing of the new table, as an .html page or a .png picture",
        )
    return parser


def _run(parser: Parser, argv: Sequence[str] | None, job: str) -> None:
    values = vars(parser.parse_args(argv))
    try:
        function: Callable = getattr(spark_jobs, job)
    except ModuleNotFoundError as error:
        if error.name not in ("pyspark", "pandas"):
            raise
        raise UserError(f"{error.name} is not installed: pip install -e '.[local]' in the checkout.") from error
    with parser.naming_flags():
        function(**values)
