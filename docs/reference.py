"""Write docs/reference.md, from the code: tables, manifests, exit codes, metrics, functions: ``make docs``."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import spark_jobs
from fft import spark
from fft.data import known
from fft.data.manifest import MANIFEST_NAME
from fft.errors import EXIT_AGAIN, EXIT_BAD_INPUT

PAGE = Path(__file__).with_suffix(".md")
#: What stands before names of types.
_MODULES = re.compile(r"(?<![\w.])(?:[a-z_]+\.)+(?=[A-Z])")

_TITLE = """# Reference

Written by `make docs` from the code. The flags of all commands are on [a page of their own](flags.md).
"""

#: What notebooks call, in the order of work.
FUNCTIONS: tuple[Callable, ...] = (
    *(getattr(spark_jobs, name) for name in ("tokenize_table", "shuffle_tables", "repartition_table")),
    *(getattr(spark_jobs, name) for name in ("tokenize", "shuffle", "pack", "generate_table", "generate")),
    *(getattr(spark_jobs, name) for name in ("write_report", "get_session")),
    spark.train_on_cluster,
)

COLUMNS = {
    "input_ids": "list of int32: the row's tokens. The one column that must be there",
    "labels": "list of int32, as long: what is trained, -100 where nothing is. Without it every token is",
    "cu_seqlens": "list of int32: where the documents of a packed row begin, first 0, last the row's length. Without "
    "it a row is one document",
    known.DOC_IDS: "list of strings: an id for each document of the row, for provenance",
    known.DATASET: "list of strings: which dataset each document is of; by it mixtures are counted and losses told",
    known.IMAGES: "list of binary: files of the row's images, as they came",
    known.GRIDS: "list of int32, three an image: its grid of patches",
}

MANIFEST = {
    "files": "of each parquet file its path in the table, its rows, tokens and bytes; of more than 10,000, the name of "
    "a list beside the manifest",
    "rows": "of all files",
    "tokens": "of all files",
    "tokenizer": "which tokenizer made the ids; null where that is not known",
    "seq_len": "the most tokens of a row, where rows are packed; else null",
    "seed": "of the table's order; null where it has none of its own",
    "lineage": "what it was made from: the job, its inputs with their versions, its parameters, what it counted and "
    "left out, how long it took",
    "format_version": "1: texts; 2: images; 3: files in a list beside the manifest; 4: pairs",
    "vision": "where rows have images: what was made of them; else not there",
    "pairs": "true where every two documents of a row are a chosen and a rejected answer; else not there",
}

TOKENIZER = {
    "name": "as it was given",
    "sha256": "of the files that decide its ids",
    "vocab_size": "every id is below it, added tokens included",
    "bos_token_id": "begins a text, or null",
    "eos_token_id": "ends one, or null",
    "pad_token_id": "fills rows elsewhere, or null: nothing is padded here",
}

_CODES = {
    0: "it is done",
    1: "a fault of the program, with its stack; or a comparison that failed (`fft.parity`, `--device_memory`, a "
    "quickstart that learned too little). `torchrun` itself ends with 1 whatever ranks end with",
    EXIT_BAD_INPUT: "something to mend: the one sentence on stderr says what",
    EXIT_AGAIN: "the same command goes on (with `--resume auto`): it was asked to stop and saved, or lost a rank or a "
    "machine",
    130: "interrupted by Ctrl-C (batch inference, quickstarts): the same command goes on",
    143: "ended by SIGTERM (batch inference): the same command goes on",
}

METRICS = {
    "step": "the step, from 1; what is measured before the first is of step 0",
    "loss": "nats a trained token, the mean over the step's global batch",
    "loss/NAME": "of tables with several datasets, or several tables: the same of the documents of each, over "
    "`tokens/NAME` (or `pairs/NAME`)",
    "lr": "the learning rate of the step",
    "grad_norm": "of all gradients together, before they are clipped",
    "skipped_steps": "steps so far that changed nothing, since their gradients were not finite",
    "loss_scale": "fp16 alone: where the dynamic loss scale stands",
    "aux_loss": "mixtures of experts alone: the loss that balances experts",
    "eval_loss": "nats a trained token of `--eval_data`",
    "eval_tokens": "over how many trained tokens that is",
    "eval_pairs": "preferences: over how many pairs",
    "rewards/chosen": "preferences: the mean reward of chosen answers; so `rewards/rejected`, `rewards/margins` of "
    "both, `rewards/accuracies`, the share of pairs in which the chosen one has more",
    "eval_rewards/chosen": "the same of `--eval_data`; so `eval_rewards/rejected`, `eval_rewards/margins`, "
    "`eval_rewards/accuracies`",
    "eval_loss/NAME": "of a table with several datasets: the loss of the documents of each, over `eval_tokens/NAME` "
    "(or `eval_pairs/NAME`)",
    "eval/NAME/loss": "of evaluation tables with names: the loss of each; so `eval/NAME/tokens`, "
    "`eval/NAME/perplexity`, and by dataset `eval/NAME/loss/DATASET`",
    "perplexity": "e to the power of it",
    "tokens_per_second": "of all ranks, the mean since the last line",
    "tokens_per_second_per_device": "the same of one",
    "mfu": "model FLOPs utilisation, of what the devices reach in matrix products",
    "mfu_datasheet": "the same of their datasheet, where it is known",
    "data_wait": "share of the time in which a step waited for its data",
    "memory": "bytes: the most that a rank has held",
    "seconds": "since the run began or was gone on with",
    "slowest_rank": "of several: the one with most work of its own a step",
    "slowest_rank_seconds": "how long that took; `fastest_rank_seconds` likewise",
    "rank_behind": "a rank that is slower than it should be; `rank_behind_times`: how many times as long it took",
    "rank_work": "a list: seconds of own work a step by rank; `rank_wait`: of waiting",
    "save_seconds": "for which a save held training up",
    "pipeline_bubble": "share of a step in which stages wait, by arithmetic",
    "matrix_flops_per_second": "what all devices reach in matrix products, measured at the start",
    "datasheet_flops_per_second": "what their datasheets promise",
}


def page() -> str:
    """The whole page."""
    tables = (
        (
            "Columns of a token table",
            "column",
            COLUMNS,
            "All other columns are told, or refused by name ([inputs](inputs.md)).",
        ),
        (
            "Fields of a manifest",
            "field",
            MANIFEST,
            f"`{MANIFEST_NAME}` beside the parquet files, JSON, written last.",
        ),
        ("The tokenizer in a manifest", "field", TOKENIZER, ""),
        ("Exit codes", "code", {str(code): meaning for code, meaning in _CODES.items()}, ""),
        (
            "Metrics",
            "name",
            METRICS,
            "`metrics.jsonl` of a run's folder has an object a line; names are those of TensorBoard and MLflow, too.",
        ),
    )
    sections = [_table(*one) for one in tables]
    return "\n".join([_TITLE, *sections, "## Python functions\n", *(_function(one) for one in FUNCTIONS)])


def _table(title: str, head: str, rows: dict[str, str], before: str) -> str:
    lines = [f"## {title}", "", *((before, "") if before else ()), f"| {head} | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {meaning} |" for name, meaning in rows.items()), ""])


def _function(function: Callable) -> str:
    """Signature and docstring of a function."""
    name = getattr(function, "__name__", "")
    signature = "".join(_signature(name, inspect.signature(function)))
    text = inspect.cleandoc(getattr(function, "__doc__", "") or "")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return f"### {name}\n\n```python\n{signature}\n```\n\n{text}\n"


def _signature(name: str, signature: inspect.Signature) -> Iterator[str]:
    """A parameter a line, as the code writes them."""
    yield f"{name}(\n"
    keyword = False
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not keyword:
            keyword = True
            yield "    *,\n"
        yield f"    {_MODULES.sub('', str(one))},\n"
    returned = signature.return_annotation
    yield ")" if returned is signature.empty else f") -> {getattr(returned, '__name__', returned)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
