"""The quickstart with every path in a store, on Sail: the tables of the same jobs on a disk, byte for byte."""

import shutil
from pathlib import Path

import pytest

from fft.data.storage import Storage
from fft.quickstart import __main__ as quickstart
from fft.quickstart import corpus, plan
from fft.quickstart.places import Lake, fetched
from fft.quickstart.plan import Folders
from spark.test_object_store import same_bytes
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

pytestmark = pytest.mark.slow

#: A share that leaves some of few documents on either side.
HOLDOUT = 0.2


@pytest.fixture
def library(tmp_path) -> Path:
    """A few modules of the standard library."""
    folder = tmp_path / "library"
    folder.mkdir()
    for path in source_files()[:40]:
        shutil.copy(path, folder)
    return folder


def source_files() -> list[Path]:
    return sorted(corpus.standard_library().glob("*.py"))


def test_every_stage(store, spark, library, tmp_path, monkeypatch, capfd):
    url = f"s3://lake/{tmp_path.name}/quickstart"
    monkeypatch.setattr(corpus, "standard_library", lambda: library)
    monkeypatch.setattr(plan, "HOLDOUT", HOLDOUT)
    monkeypatch.setenv("FFT_ENGINE", "sail")
    command = ["--lake", url, "--output", str(tmp_path / "notes"), "--max_steps", "2"]
    assert quickstart.main(command) == 1
    said = capfd.readouterr()
    assert "the model learned too little" in said.err
    assert f"model: {url}/model" in said.out
    assert [path.name for path in (tmp_path / "notes").iterdir()] == [".stages"]
    folders = Folders(Lake(url), tmp_path / "notes")
    names = {"corpus.jsonl", "tokenizer", "tokens", "shuffled", "packed", "model", "run", "prompts.jsonl"}
    assert set(Storage.at(url).here()) == names | {"completions.jsonl", "loss.png"}
    with fetched(folders.corpus) as documents, fetched(folders.tokenizer) as tokenizer:
        tokenize_table(documents, tmp_path / "tokens", tokenizer, spark=spark)
    shuffle_tables(tmp_path / "tokens", tmp_path / "shuffled", seed=0, holdout=HOLDOUT, spark=spark)
    repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=512, num_partition=4, spark=spark)
    for name in ("tokens", "shuffled/train", "shuffled/validation", "packed/train", "packed/validation"):
        assert same_bytes(f"{url}/{name}", tmp_path / name)
    capfd.readouterr()
    assert quickstart.main(command) == 1
    assert capfd.readouterr().err.count("already done") == 8
