"""The quickstart with pictures, shortened: drawn, tokenized by Spark, trained by two ranks, and asked."""

import json

import pytest
import yaml
from conftest import ROOT
from thorough import thorough

from fft.data.table import Table
from fft.quickstart.vision import __main__ as quickstart
from fft.quickstart.vision import plan
from fft.quickstart.vision.scores import Score

pytestmark = pytest.mark.slow
HELD_OUT = 60
#: Half of the tokens a step: what is seen first depends on how many steps there were.
SHORT = {"seq_len": 256, "learning_rate": 1.5e-3}


@pytest.mark.parametrize(("pictures", "steps", "lead"), [(200, 20, -1.0), thorough(2000, 600, 0.1)])
def test_pictures_are_seen(pictures, steps, lead, tmp_path, monkeypatch, capfd):
    """With all steps, which take minutes, it has learned to count; with a few every stage has come to its end."""
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load((ROOT / plan.CONFIG).read_text()) | SHORT))
    for name, value in (("CONFIG", str(config)), ("PICTURES", pictures), ("HELD_OUT", HELD_OUT)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(quickstart, "LEAD", lead)
    given = ["--output", str(tmp_path / "out"), "--max_steps", str(steps)]
    assert quickstart.main(given) == 0
    folders = plan.VisionFolders(tmp_path / "out")
    table = Table.open(folders.tokens)
    facts = {path.stem: json.loads(path.read_text())["facts"] for path in folders.records.glob("*.json")}
    assert table.has_images
    assert table.rows == facts["pictures"]["questions"] > pictures
    by_kind = {score["kind"]: Score(**score) for score in facts["report"]["scores"]}
    # Of 60 questions, whose four answers are as likely as each other, a lead of 0.4 is six standard deviations.
    assert by_kind["count"].lead > (0.4 if lead > 0 else lead)
    assert by_kind["all"].asked == facts["pictures"]["held_out_questions"]
    assert by_kind["all"].lead > lead
    first = capfd.readouterr()
    assert "answered rightly" in first.out
    assert quickstart.main(given) == 0
    again = capfd.readouterr()
    assert again.err.count("already done") == 6
    assert again.out == first.out
