"""Names of catalog tables beside paths, and manifests as properties of tables, without Spark."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fft.data.manifest import FileInfo, Manifest, TokenizerInfo
from fft.errors import UserError
from spark_jobs.token_table.catalog import as_property, is_table_name, of_property, quoted
from spark_jobs.token_table.engine_table import distinct_names
from spark_jobs.token_table.spark_output import by_spark

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(name=TEXTS, rows=st.integers(0, 2**60), lineage=st.dictionaries(TEXTS, TEXTS | st.integers() | st.none()))
def test_a_manifest_survives_as_a_property(name, rows, lineage):
    tokenizer = TokenizerInfo(name, "token secret password", 5)
    manifest = Manifest((FileInfo(name, rows, rows, 0),), rows, rows, tokenizer, 512, lineage=lineage)
    text = as_property(manifest)
    # Neither is there anything to escape in SQL, nor a word by which Spark would hide the value.
    assert re.fullmatch("[0-9a-f]+", text)
    assert of_property(text, "the property") == manifest


@pytest.mark.parametrize("text", ["", "token", "00", "7b7d", as_property(Manifest((), 0, 0))[:-8]])
def test_what_is_no_manifest_is_said(text):
    with pytest.raises(UserError, match="the property is no"):
        of_property(text, "the property")


def test_which_names_are_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.v1").mkdir()
    named = ["lake.tokens", "main.lake.tokens", "runs.v2", "l\u00e4ke.t"]
    paths = [
        "tokens",
        "./runs.v2",
        "runs.v1",
        "a/b.c",
        "s3://lake/t",
        "corpus.jsonl",
        "a.parquet",
        "a.b.c.d",
        "a..b",
        "a.b ",
    ]
    assert [name for name in named + paths if is_table_name(name)] == named
    assert [by_spark(None, name) for name in named + paths] == [True] * len(named) + [False] * len(paths)
    assert by_spark("spark", "a/b")
    assert not by_spark("parts", "a/b")
    with pytest.raises(UserError, match=r"names a table of a catalog.*\./lake\.tokens"):
        by_spark("parts", "lake.tokens")
    assert quoted("main.default.select") == "`main`.`default`.`select`"


def test_tables_are_named_as_shortly_as_can_be():
    assert distinct_names(["lake.web", "lake.books"], []) == ["web", "books"]
    assert distinct_names(["a.web", "b.web", "b.code"], ["code"]) == ["a.web", "b.web", "b.code"]
