"""Texts of strangers where they are shown: no terminal obeys them, and no browser."""

import contextlib
import io
import re
import sys
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from unit.security.strangers import make_all

from fft.chart import bars, losses
from fft.checkpoint.card import card_of
from fft.console import say
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.table import Table
from fft.errors import UserError, run_cli
from fft.report.page import page_of
from fft.report.run import read_run
from fft.text.shown import as_text, documents_of_row
from fft.text.shown_page import as_page

#: A title of the window, a screen that is cleared, a letter that turns what follows around, in eight bits, too.
OBEYED = "\x1b]0;mine\x07\x1b[2J\x9b2J\u202e\x00\r"
TAG = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
#: What of these letters may be in what is printed: lines, tabs, and the colours of what is trained.
SEEN = re.compile(r"\x1b\[(32|2|0)m")


def is_obeyed(text: str) -> bool:
    return any(not letter.isprintable() and letter not in "\n\t" for letter in SEEN.sub("", text))


class Decoder:
    """Of a tokenizer whose every token is an attack."""

    def decode(self, token_ids, **_):
        return f"{OBEYED}\x1b[32m{TAG}" * len(token_ids)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def documents(tmp_path):
    """A row whose document has such a name."""
    ids = pa.array([[1, 2, 3]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids, "doc_ids": pa.array([[f"{OBEYED}\n{TAG}"]])}), tmp_path / "a.parquet")
    size = (tmp_path / "a.parquet").stat().st_size
    commit(tmp_path, Manifest((FileInfo("a.parquet", 1, 3, size),), 1, 3))
    return documents_of_row(Table.open(tmp_path), 0)


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_no_terminal_obeys_a_row_that_is_shown(documents, ids, colour):
    """Also where it is piped to a pager, which is no terminal."""
    shown = as_text(documents, Decoder(), ids, colour)
    assert "script" in shown
    assert "mine" in shown
    assert not is_obeyed(shown)
    assert shown.count("\n--- ") == 0  # a name of two lines is no second heading
    if not colour:
        assert "\x1b" not in shown


def test_a_page_of_a_row_has_no_tag_of_its_texts(documents):
    for ids in (True, False):
        assert tags_of(as_page(TAG, documents, Decoder(), ids, TAG)).isdisjoint({"script", "img"})


def test_no_terminal_obeys_what_a_command_says(monkeypatch):
    def refuse():
        raise UserError(f"{OBEYED} is no model")

    def fail():
        raise ValueError(OBEYED)

    for act in (lambda: say(OBEYED), lambda: run_cli(refuse), lambda: run_cli(fail)):
        monkeypatch.setattr(sys, "stderr", printed := Terminal())
        with contextlib.suppress(SystemExit):
            act()
        assert "\\x1b]0;mine\\x07" in printed.getvalue()
        assert not is_obeyed(printed.getvalue())


def test_letters_of_other_scripts_are_said_as_they_are(capsys):
    words = "Größe 模型\u3000数据 1\u00a0000 שלום"
    say(words)
    assert capsys.readouterr().err == f"{words}\n"


@pytest.fixture
def hostile_run(tmp_path):
    """A run whose every name is an attack."""
    make_all(tmp_path)
    run = (tmp_path / "run").rename(tmp_path / "<img src=x onerror=alert(1)>")
    (run / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 2.0, "eval/{TAG}/loss": 1.0}}\n'.replace("\"'", "'")
        + '{"step": 2, "loss": 1.0, "rank_work": [1, 2]}\n'
    )
    facts = {"train_data": {TAG: 1, "tables": [{"table": TAG, "version": TAG, "rows": TAG, "trained": TAG}]}}
    (run / "data.yaml").write_text(yaml.safe_dump(facts | {TAG: {"table": TAG}}))
    (run / "environment.yaml").write_text(yaml.safe_dump({TAG: TAG, "ranks": {TAG: TAG}}))
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings | {"freeze": TAG, TAG: TAG, "run_name": TAG}))
    return run


def tags_of(page: str) -> set[str]:
    found: set[str] = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.add(tag)
            found.update(name for name, _ in attrs if name.startswith("on"))

    Tags().feed(page)
    return found


def test_the_page_of_a_run_has_no_tag_of_its_names(hostile_run):
    page = page_of([read_run(hostile_run)] * 2)
    assert "alert(1)" in page
    assert not tags_of(page) & {"script", "img", "iframe", "onerror"}
    picture = losses([(1, 2.0)], [(1, 1.0)], {TAG: [(1, 1.0)]}) + bars([(TAG, [(TAG, 1.0, TAG)])])
    assert not tags_of(picture) & {"script", "img", "onerror"}


def test_a_card_has_no_tag_of_its_tables(tmp_path):
    table = {"use": "train", "table": f"/data/{TAG}\\|a|b\n# mine{OBEYED}", "version": TAG, "fingerprint": TAG}
    state = {"step": 1, "arguments": {"model": str(tmp_path), "freeze": TAG}, "tables": [table], "versions": {TAG: TAG}}
    card = card_of(state, "llama")
    assert "<" not in card.partition("---\n\n")[2].replace("<br>", "")
    assert not is_obeyed(card)
    (row,) = [line for line in card.splitlines() if line.startswith("| train")]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 8  # of seven columns
    assert "\n# mine" not in card
