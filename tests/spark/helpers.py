"""Make and read small tables and tokenizers."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"

#: What Spark's own daemon prints of a worker whose driver is gone while it waits for work: no frame of ours in it.
ORPHANED = re.compile(
    r"^Traceback \(most recent call last\):\n"
    r'(?:[ \t]+File "[^"\n]*pyspark/(?:daemon|serializers)\.py", line .*\n(?:[ \t]+(?!File ).*\n)*)+'
    r"(?:ConnectionResetError|BrokenPipeError|EOFError).*\n?",
    re.MULTILINE,
)


def stacks_of_ours(stderr: str) -> bool:
    """Whether a stack was printed, but for those of Spark's workers that outlive a job which failed by a moment."""
    return "Traceback" in ORPHANED.sub("", stderr)


def write_lines(path: Path, *lines: str | dict) -> Path:
    """A file of JSON lines, in which texts stand as they are."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def save_tokenizer(folder: Path, texts: list[str], begin: str | None = None) -> Path:
    """A byte-level BPE tokenizer as Hugging Face saves it; with ``begin``, it puts that token before every text."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END] + ([begin] if begin else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=begin).save_pretrained(folder)
    return folder


def files_of(table: Path) -> list[Path]:
    """A table's parquet files in order."""
    return sorted(p for p in table.glob("*.parquet") if not p.name.startswith(("_", ".")))


def rows_of(table: Path) -> list[dict]:
    """A table's rows in the order of its files."""
    return [row for file in files_of(table) for row in pq.read_table(file).to_pylist()]


def hashes_of(table: Path) -> list[str]:
    """A hash of each file's rows, in order."""
    return [hashlib.sha256(repr(pq.read_table(file).to_pylist()).encode()).hexdigest() for file in files_of(table)]


def write_foreign(folder: Path, rows: list[list[int]], **columns: list) -> Path:
    """A table as another program would leave it: no manifest."""
    folder.mkdir(parents=True)
    data = {"input_ids": pa.array(rows, pa.list_(pa.int32()))} | columns
    pq.write_table(pa.table(data), folder / "part-0.parquet")
    return folder
