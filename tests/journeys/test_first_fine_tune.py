"""docs/first-fine-tune.md, walked through with short trainings of fewer conversations."""

import json
import re

import pytest
import yaml
from conftest import ROOT
from pages import blocks
from walk import commands_of, walk

from fft.quickstart.chat.scores import read_answered

pytestmark = pytest.mark.slow
PAGE = "docs/first-fine-tune.md"
#: In place of the page's numbers.
SHORT = {"conf/quickstart-chat-base.yaml": {"max_steps": 12}, "conf/quickstart-chat.yaml": {"max_steps": 8}}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder of the page, and what each of its commands told."""
    folder = tmp_path_factory.mktemp("first")
    places = {"runs/first": folder}
    for name, shorter in SHORT.items():
        settings = yaml.safe_load((ROOT / name).read_text()) | shorter | {"warmup_steps": 2, "eval_steps": 4}
        places[name] = folder / name.rpartition("/")[2]
        if "base" in name:
            del settings["eval_steps"]
        places[name].write_text(yaml.safe_dump(settings))
    commands = commands_of(PAGE, places)
    commands[0] += ["--talks", "300", "--chats", "200", "--held_out", "20"]
    return folder, [(command[2], walk(command)) for command in commands]


def test_the_page_arrives(walked):
    folder, told = walked
    for name in ("before", "after"):
        rows = read_answered(folder / f"{name}.jsonl")
        assert len(rows) == 20
        assert all(isinstance(row["text"], str) for row in rows)
    assert [name for name, _ in told][-1] == "fft.quickstart.chat.scores"
    assert told[-1][1].count("of 20 right") == 2
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "model" / "adapter_config.json").exists()
    assert "I want" in dict(told)["fft.show"]
    assert (folder / "run.html").read_text().startswith("<!doctype html>")


def test_metrics_are_those_of_the_reference(walked):
    folder, _ = walked
    page = (ROOT / "docs" / "reference.md").read_text().partition("## Metrics\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([\w/]+)`", page))
    for run in ("run", "base-run"):
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        assert {name for line in lines for name in json.loads(line)} <= documented


def test_the_page_shows_a_conversation_as_it_is_written(walked):
    folder, _ = walked
    (shown,) = [json.loads(block.text) for block in blocks(PAGE) if block.language == "json"]
    row = json.loads((folder / "chats.jsonl").read_text().partition("\n")[0])
    assert shown.keys() == row.keys()
    assert [turn.keys() for turn in shown["messages"]] == [turn.keys() for turn in row["messages"]]
