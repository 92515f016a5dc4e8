"""One Spark session, one corpus of real text and one tokenizer for all tests of the jobs."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"


@pytest.fixture(scope="session")
def spark():
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.log.level", "OFF")
        .getOrCreate()
    )
    yield session
    session.stop()


@pytest.fixture(scope="session")
def documents() -> list[dict]:
    """Source files of the standard library: about 2 MB, of very different lengths."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    return [{"id": path.name, "text": text} for path in paths if (text := path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
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


@pytest.fixture(scope="session")
def tokenizer(documents, tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), [d["text"] for d in documents[:40]])


@pytest.fixture(scope="session")
def tokens(spark, corpus, tokenizer, tmp_path_factory) -> Path:
    """The corpus as a token table."""
    from spark_jobs import tokenize_table

    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    tokenize_table(corpus, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def shuffled(spark, tokens, tmp_path_factory) -> Path:
    """The token table shuffled, a tenth held out: folders ``train`` and ``validation``."""
    from spark_jobs import shuffle_tables

    folder = tmp_path_factory.mktemp("shuffled") / "shuffled"
    shuffle_tables(tokens, folder, holdout=0.1, num_block=4)
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
