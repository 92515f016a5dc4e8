"""docs/flags.md is what the commands' parsers say, docs/reference.md what the code does."""

import re
import runpy
from dataclasses import fields

from conftest import ROOT

import spark_jobs
from fft.data import known
from fft.data.manifest import Manifest, TokenizerInfo
from fft.training.metric_sinks import _GROUPS


def test_the_page_is_up_to_date_and_complete():
    made = runpy.run_path(str(ROOT / "docs" / "flags.py"))
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == made["page"](), "make docs"
    known = {make.__module__ for make in made["_PARSERS"]}
    own = (path for path in (ROOT / "fft").rglob("*.py") if "\ndef build_parser(" in path.read_text(encoding="utf-8"))
    assert {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in own} == known - {"spark_jobs.cli"}


def test_the_reference_is_up_to_date_and_complete():
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == made["page"](), "make docs"
    assert {one.name for one in fields(Manifest)} == set(made["MANIFEST"])
    assert {one.name for one in fields(TokenizerInfo)} == set(made["TOKENIZER"])
    assert {*known.LISTS, known.IMAGES, known.GRIDS, known.DOC_IDS, known.DATASET} == set(made["COLUMNS"])
    assert set(_GROUPS) <= set(re.findall(r"`([\w/]+)`", made["page"]().partition("## Metrics")[2]))
    assert {function.__name__ for function in made["FUNCTIONS"]} == {*spark_jobs.__all__, "train_on_cluster"}
