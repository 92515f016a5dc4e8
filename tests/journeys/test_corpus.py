"""docs/corpus.md, walked through with three data sets of few documents, on Sail."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from walk import commands_of, python_of, walk

from fft.data.manifest import read_manifest
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

pytestmark = pytest.mark.slow
PAGE = "docs/corpus.md"
WORDS = ("row", "table", "token", "order", "seed", "model", "reads", "writes", "lake", "part", "many", "few", "of")


def text(name: str, number: int) -> str:
    return " ".join(f"{name} {number}" if i % 9 == 0 else WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(60))


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """Three data sets, and the news of one of them."""
    folder = tmp_path_factory.mktemp("lake")
    for name, count in (("wiki", 200), ("books", 90), ("code", 60), ("wiki-news", 30)):
        (folder / name).mkdir()
        first = 1000 if name == "wiki-news" else 0
        rows = [{"id": f"{name}/{n}", "text": text(name, n)} for n in range(first, first + count)]
        (folder / name / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(train_tokenizer((text("wiki", n) for n in range(50)), 300), folder / "tokenizer")
    return folder


def test_the_page_arrives(lake, tmp_path):
    places = {"lake/": f"{lake}/", "tables/": f"{tmp_path}/", "max_len=2048": "max_len=128"}
    script = tmp_path / "page.py"
    script.write_text(python_of(PAGE, places))
    # A folder of its own is the script's; the checkout is where its modules are.
    variables = {**os.environ, "FFT_ENGINE": "sail", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    made = [read_manifest(tmp_path / name / "train") for name in ("packed", "packed-2")]
    assert [one.seq_len for one in made if one] == [128, 128]
    held = [set(ids(tmp_path / name / "validation")) for name in ("mixed", "mixed-2")]
    assert held[0]
    assert held[0] <= held[1]  # what was held out stays so
    assert not held[1] & set(ids(tmp_path / "mixed-2" / "train"))
    model = tmp_path / "config.json"
    model.write_text(json.dumps(SMALL | {"model_type": "llama", "vocab_size": 320}))
    shorter = {
        "tables/": f"{tmp_path}/",
        "lake/": f"{lake}/",
        "path/to/hf-model": str(model),
        "2048": "128",
        "1000": "3",
    }
    show, train = commands_of(PAGE, shorter | {"runs/": f"{tmp_path}/runs/"})
    assert any(name in (told := walk(show)) for name in ("wiki", "books", "code")), told
    told = walk([*train, "--init", "--tokenizer", str(lake / "tokenizer"), "--dtype", "fp32"])
    assert "step 3/3" in told
    assert (tmp_path / "runs" / "model" / "config.json").is_file()


def ids(table) -> list[str]:
    """Ids of a table's documents."""
    import pyarrow.parquet as pq

    found = []
    for path in sorted(table.glob("*.parquet")):
        for row in pq.read_table(path, columns=["doc_ids"])["doc_ids"].to_pylist():
            found += row if isinstance(row, list) else [row]
    return found
