"""Flags of tokenize.py that say how records become rows; --keep is shuffle.py's, too."""

from fft.corpus.splits import MOST_BYTES
from fft.errors import Parser, positive
from fft.images.rules import LIMITS
from spark_jobs.cli_values import column_names
from spark_jobs.parameters import CHOICES


def add_record_flags(parser: Parser) -> None:
    """Those that say what becomes of records."""
    parser.add_argument(
        "--parse_special_tokens",
        action="store_true",
        help="let special-token strings in the text become control tokens (default: they are ordinary text)",
    )
    parser.add_argument(
        "--on_error",
        choices=CHOICES["on_error"],
        default="fail",
        help="malformed records end the job (default), or go to OUTPUT/_quarantine and are counted",
    )
    add_keep(parser, "other keys or columns of the records")
    parser.add_argument(
        "--show",
        type=positive,
        default=0,
        metavar="N",
        help="then print the first N rows, what is trained marked",
    )


def add_row_flags(parser: Parser) -> None:
    """Those that say how large documents and their images may be."""
    parser.add_argument(
        "--max_len",
        type=positive,
        help="cut longer documents to rows of this many tokens, chats between turns (default: no cut)",
    )
    parser.add_argument(
        "--max_document_bytes",
        type=positive,
        default=MOST_BYTES,
        metavar="N",
        help="a line, or a text between blank lines, of so many bytes ends the job (default: %(default)s)",
    )
    parser.add_argument(
        "--image_path",
        metavar="DIR",
        help="read images of chats, named files from this folder; --tokenizer is then the whole directory of a model",
    )
    for name, meaning in LIMITS.items():
        parser.add_argument(f"--{name}", type=positive, help=f"{meaning} (default: the model's own limit)")


def add_keep(parser: Parser, what: str) -> None:
    """What is carried along."""
    meaning = f"{what} to carry along as texts, one a document; repartition keeps them"
    parser.add_argument("--keep", type=column_names, metavar="NAME,...", help=meaning)
