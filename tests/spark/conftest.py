"""One Spark session, one corpus of real text and one tokenizer for all tests of the jobs."""

import json
import sysconfig
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from spark.helpers import save_tokenizer


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
