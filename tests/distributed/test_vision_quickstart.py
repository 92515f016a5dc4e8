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


#: Twenty steps bring every stage to its end, and teach nothing.
@pytest.mark.parametrize(("pictures", "steps", "learned"), [(200, 20, False), thorough(2000, 600, True)])
def test_pictures_are_seen(pictures, steps, learned, tmp_path, monkeypatch, capfd):
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load((ROOT / plan.CONFIG).read_text()) | SHORT))
    for name, value in (("CONFIG", str(config)), ("PICTURES", pictures), ("HELD_OUT", HELD_OUT)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(quickstart, "LEAD", 0.1 if learned else -1.0)
    given = ["--output", str(tmp_path / "out"), "--max_steps", str(steps)]
    assert quickstart.main(given) == 0
    folders = plan.VisionFolders(tmp_path / "out")
    table = Table.open(folders.tokens)
    facts = {path.stem: json.loads(path.read_text())["facts"] for path in folders.records.glob("*.json")}
    assert table.has_images
    assert table.rows == facts["pictures"]["questions"] > pictures
    by_kind = {score["kind"]: Score(**score) for score in facts["report"]["scores"]}
    assert by_kind["all"].asked == facts["pictures"]["held_out_questions"]
    if learned:
        # Of 60 questions, whose four answers are as likely as each other, a lead of 0.4 is six standard deviations.
        assert by_kind["count"].lead > 0.4
        assert by_kind["all"].lead > 0.1
    first = capfd.readouterr()
    assert "answered rightly" in first.out
    assert quickstart.main(given) == 0
    again = capfd.readouterr()
    assert again.err.count("already done") == 6
    assert again.out == first.out
