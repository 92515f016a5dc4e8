import json

import pytest

from fft.errors import UserError
from fft.quickstart.corpus import read_texts, source_files, standard_library, write_corpus
from fft.quickstart.stages import fingerprint


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "lib"
    for name in ("b.py", "a/c.py", "a/notes.txt", "site-packages/x.py", "dist-packages/y.py", "a/__pycache__/z.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name} \u00e4\n", encoding="utf-8")
    (root / "latin.py").write_bytes(b"# \xe4\n")
    (root / "empty.py").write_text("\n")
    return root


def test_every_source_once_in_the_order_of_paths(library, tmp_path):
    output = tmp_path / "out" / "corpus.jsonl"
    summary = write_corpus(library, output)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert records == [
        {"id": "a/c.py", "text": "# a/c.py \u00e4\n"},
        {"id": "b.py", "text": "# b.py \u00e4\n"},
    ]
    assert (summary.documents, summary.undecodable) == (2, 1)
    assert summary.bytes == sum(len(text.encode()) for text in read_texts(output))
    assert [p.name for p in output.parent.iterdir()] == ["corpus.jsonl"]


def test_fingerprint_follows_the_sources_alone(library):
    before = fingerprint(source_files(library))
    (library / "a/notes.txt").write_text("other")
    assert fingerprint(source_files(library)) == before
    (library / "b.py").write_text("other, and longer")
    assert fingerprint(source_files(library)) != before


def test_a_library_without_sources_is_an_error(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(UserError, match="holds no Python sources to learn from"):
        write_corpus(tmp_path / "lib", tmp_path / "corpus.jsonl")
    assert not list(tmp_path.glob("*corpus*"))


def test_the_running_python_has_a_library():
    assert (standard_library() / "json" / "decoder.py").is_file()
