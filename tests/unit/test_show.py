"""What is shown as trained is what the table's labels say and what the trainer counts, and the text is the row's."""

import re
from itertools import pairwise

import numpy as np
import pytest
from conversations import write_chats
from device.token_tables import write_table
from pairs import random_pairs, write_pairs
from spark.chat_templates import save_chat_tokenizer
from transformers import AutoTokenizer

from fft.corpus.local import table_of, text_input
from fft.data.batches import micro_batch
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table
from fft.errors import UserError
from fft.show import main
from fft.text.shown import as_text, documents_named, documents_of_row, first_sample, load_decoder
from fft.text.shown_page import as_page


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen2.5", "qwen2.5")


@pytest.fixture(scope="module")
def chats(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return Table.open(table_of(text_input(write_chats(folder / "chats.jsonl", 40), tokenizer, 4096), folder / "cache"))


def test_what_is_marked_is_what_labels_say_and_what_the_trainer_counts(chats, tokenizer):
    decoder, row, counted = load_decoder(chats, str(tokenizer)), 0, 0
    for group in range(len(chats.row_groups)):
        rows = chats.read(group)
        for begin, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            (document,) = documents_of_row(chats, row)
            ids, labels = rows.input_ids[begin:end], rows.labels[begin:end]
            np.testing.assert_array_equal(document.ids, ids)
            np.testing.assert_array_equal(document.trained, labels != IGNORE)
            told = as_text([document], decoder, ids=False, colour=False).partition("---\n")[2]
            assert re.sub("[⟦⟧]", "", told) == decoder.decode(ids)
            marked = "".join(re.findall("⟦(.*?)⟧", told, re.DOTALL))
            assert marked == "".join(decoder.decode(ids[a:b]) for a, b in stretches(labels != IGNORE))
            row, counted = row + 1, counted + int(document.trained.sum())
    reader = SampleReader(chats, 4096, seed=0, shuffle=False, pack="best-fit")
    samples = reader.samples_per_epoch
    assert micro_batch(reader, range(samples), samples).trained == counted


def stretches(mask):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return zip(edges[::2], edges[1::2], strict=True)


def test_a_packed_row_without_labels_and_a_character_that_is_cut(tokenizer, tmp_path):
    """Nothing predicts the first token of a document; bytes of a character on both sides of a cut make one."""
    decoder = AutoTokenizer.from_pretrained(tokenizer)
    first, second = (np.array(decoder.encode(text), np.int32) for text in ("def f", "return €"))
    row = np.concatenate((first, second))
    folder = write_table(tmp_path / "t", [row, row], cu_seqlens=[[0, len(first), len(row)]] * 2)
    one, other = documents_of_row(Table.open(folder), 1)
    assert (one.begin, other.begin) == (0, len(first))
    assert one.trained.tolist() == [False] + [True] * (len(first) - 1)
    assert f"row 1, document 1: tokens {len(first)} to {len(row)}, {len(second) - 1} trained" in other.heading
    assert len(decoder.encode("€")) > 1
    labels = [np.where(np.arange(len(second)) == len(second) - 1, second, IGNORE)]
    cut = documents_of_row(Table.open(write_table(tmp_path / "cut", [second], files=1, labels=labels)), 0)
    assert as_text(cut, decoder, ids=False, colour=False).endswith("return ⟦€⟧")


def test_sides_of_a_pair_are_called_what_they_are(tmp_path):
    (chosen, rejected), *_ = pairs = random_pairs(3, 50)
    sides = documents_of_row(Table.open(write_pairs(tmp_path / "t", pairs)), 0)
    assert [side.ids.tolist() for side in sides] == [chosen[0], rejected[0]]
    assert [side.heading.partition(": ")[0] for side in sides] == ["row 0, pair 0, chosen", "row 0, pair 0, rejected"]


def test_a_document_by_its_id(chats, tokenizer):
    name = documents_of_row(chats, 7)[0].name
    (found,) = documents_named(chats, name)
    assert (found.row, found.name) == (7, name)
    with pytest.raises(UserError, match="no document with the id 'nobody'"):
        documents_named(chats, "nobody")
    with pytest.raises(UserError, match=r"--row 40: .* has rows 0 to 39"):
        documents_of_row(chats, 40)


def test_the_command(chats, tokenizer, tmp_path, capsys):
    main([chats.path, "--tokenizer", str(tokenizer), "--row", "2", "--ids"])
    lines = capsys.readouterr().out.splitlines()
    (document,) = documents_of_row(chats, 2)
    assert len(lines) == len(document.ids) + 1
    assert [int(line.split()[1]) for line in lines[1:]] == document.ids.tolist()
    assert [line[20] == "+" for line in lines[1:]] == document.trained.tolist()
    page = tmp_path / "page.html"
    main([chats.path, "--tokenizer", str(tokenizer), "--html", str(page)])
    assert "<mark>" in page.read_text()
    with pytest.raises(UserError, match="exists: give --overwrite"):
        main([chats.path, "--tokenizer", str(tokenizer), "--html", str(page)])
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        main([chats.path, "--tokenizer", str(tokenizer), "--html", str(tmp_path / "nowhere" / "page.html")])
    with pytest.raises(UserError, match="--tokenizer"):
        main([str(write_table(tmp_path / "foreign", [np.arange(5, dtype=np.int32)]))])


def test_nothing_of_a_text_is_obeyed(tokenizer, tmp_path):
    """By a browser or a terminal."""
    decoder = AutoTokenizer.from_pretrained(tokenizer)
    row = np.array(decoder.encode("x<b>&\x1b[31m\n"), np.int32)
    documents = documents_of_row(Table.open(write_table(tmp_path / "t", [row])), 0)
    assert "<b>" not in as_page("<b>", documents, decoder, ids=False)
    shown = as_text(documents, decoder, ids=False, colour=True)
    assert set(re.findall(r"\x1b\[\d+m", shown)) <= {"\x1b[32m", "\x1b[2m", "\x1b[0m"}


def test_the_first_sample_is_what_the_trainer_reads_first(chats, tokenizer):
    """Cut anywhere, or packed: what is marked are the targets of the first micro-batch, and no others."""
    decoder = load_decoder(chats, str(tokenizer))
    for pack, seq_len in (("cut", 40), ("best-fit", 64)):
        reader = SampleReader(chats, seq_len, seed=3, pack=pack)
        batch = micro_batch(reader, [0], reader.samples_per_epoch)
        told = first_sample(reader, str(tokenizer), colour=False)
        bounds = np.unique(batch.cu_seqlens)
        pieces = [(batch.input_ids[0, a:b], batch.labels[a:b]) for a, b in pairwise(bounds)]
        marked = [ids[1:][labels[:-1] != IGNORE] for ids, labels in pieces]
        found = "".join(re.findall("⟦(.*?)⟧", told, re.DOTALL))
        assert found == decoder.decode(np.concatenate(marked))
        assert "more" not in told
    whole = first_sample(SampleReader(chats, 4096, seed=3, pack="best-fit"), str(tokenizer), colour=False)
    assert re.search(r"\.\.\. and [\d,]+ tokens more$", whole)
