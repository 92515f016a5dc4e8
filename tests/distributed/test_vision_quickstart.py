"""The quickstart with pictures, shortened: drawn, tokenized by Spark, trained by two ranks, and asked."""

import json

import pytest
import yaml
from conftest import ROOT

from fft.data.table import Table
from fft.quickstart.vision import __main__ as quickstart
from fft.quickstart.vision import plan
from fft.quickstart.vision.scores import Score

pytestmark = pytest.mark.slow
PICTURES, HELD_OUT, STEPS = 2000, 60, 600
#: Half of the tokens a step: what is seen first depends on how many steps there were.
SHORT = {"seq_len": 256, "learning_rate": 1.5e-3}


def test_pictures_are_seen(tmp_path, monkeypatch, capfd):
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load((ROOT / plan.CONFIG).read_text()) | SHORT))
    for name, value in (("CONFIG", str(config)), ("PICTURES", PICTURES), ("HELD_OUT", HELD_OUT)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(quickstart, "LEAD", 0.1)
    given = ["--output", str(tmp_path / "out"), "--max_steps", str(STEPS)]
    assert quickstart.main(given) == 0
    folders = plan.VisionFolders(tmp_path / "out")
    table = Table.open(folders.tokens)
    facts = {path.stem: json.loads(path.read_text())["facts"] for path in folders.records.glob("*.json")}
    assert table.has_images
    assert table.rows == facts["pictures"]["questions"] > PICTURES
    by_kind = {score["kind"]: Score(**score) for score in facts["report"]["scores"]}
    # Of 60 questions, whose four answers are as likely as each other, a lead of 0.4 is six standard deviations.
    assert by_kind["count"].lead > 0.4
    assert by_kind["all"].asked == facts["pictures"]["held_out_questions"]
    assert by_kind["all"].lead > 0.1
    first = capfd.readouterr()
    assert "answered rightly" in first.out
    assert quickstart.main(given) == 0
    again = capfd.readouterr()
    assert again.err.count("already done") == 6
    assert again.out == first.out
