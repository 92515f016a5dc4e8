"""docs/models.md is what is measured: a tenth of it is measured again, another one every day."""

import datetime

import pytest
import transformers
from conftest import ROOT

from fft.errors import UserError
from fft.models.__main__ import main
from fft.models.supported import FAMILIES
from fft.models.table import EXACT, REFUSED, TypeRow, every_type, page, rows_in

PAGE = ROOT / "docs" / "models.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_today_s_tenth_of_the_page_is_what_is_measured():
    tenth = every_type()[datetime.datetime.now(datetime.UTC).toordinal() % 10 :: 10]
    assert main(["--types", ",".join(tenth), "--check", str(PAGE)]) == 0


def test_the_page_has_every_type_and_says_all_that_is_said_of_it():
    rows = rows_in(TEXT)
    assert list(dict(sorted(rows.items()))) == every_type()
    assert page([rows[kind] for kind in every_type()]) == TEXT, "make docs"
    assert f"with transformers {transformers.__version__}." in TEXT
    trained = [kind for kind, row in rows.items() if row.verdict == EXACT]
    assert set(trained) == set(FAMILIES) & set(every_type())
    assert all(row.why for row in rows.values() if row.verdict == REFUSED)


def test_a_page_that_says_something_else_is_told(tmp_path, capsys):
    rows = rows_in(TEXT)
    changed = page([TypeRow("llama", EXACT, "loss 1e-07", halves="no"), rows["bert"]])
    (tmp_path / "models.md").write_text(changed)
    assert main(["--types", "llama,bert,qwen2", "--check", str(tmp_path / "models.md")]) == 1
    told = capsys.readouterr().err.splitlines()[1:]
    assert [line.partition(":")[0] for line in told] == ["llama", "qwen2"]
    assert "halves='yes'" in told[0]
    assert told[1].endswith("the page has None")


def test_rounding_is_no_difference():
    assert TypeRow("llama", EXACT, "loss 1e-07").same_as(TypeRow("llama", EXACT, "loss 2e-07"))
    assert not TypeRow("gpt2", REFUSED, "a reason").same_as(TypeRow("gpt2", REFUSED, "another"))


def test_what_is_no_type_and_what_is_no_page_is_named(tmp_path):
    with pytest.raises(UserError, match="--types lla: no model type that transformers knows; choose of afmoe,"):
        main(["--types", "llama,lla"])
    with pytest.raises(UserError, match=r"absent does not exist: write it with python -m fft.models >"):
        main(["--check", str(tmp_path / "absent")])
