import json

import pytest
from conftest import ROOT

from fft.arguments import parse_arguments
from fft.images.grids import grid_of, tokens_of
from fft.images.rules import ImageLimits, load_rules
from fft.quickstart import commands
from fft.quickstart.stages import Record
from fft.quickstart.vision import __main__ as quickstart
from fft.quickstart.vision.model import SPECIAL, write_directory
from fft.quickstart.vision.pictures import CELL, PLACES
from fft.quickstart.vision.plan import MODEL, VisionFolders, vision_stages
from fft.quickstart.vision.scores import Score, commonest, draw_answers, scores, table
from fft.serve import batch_infer
from spark_jobs.cli import tokenize_parser


@pytest.fixture
def folders(tmp_path):
    return VisionFolders(tmp_path / "out")


def answer(kind, question, answer, text, seen, picture="a.png"):
    return {"kind": kind, "question": question, "answer": answer, "text": text, "seen": seen, "picture": picture}


ANSWERS = [
    answer("colour", "What colour?", "red", " red", True),
    answer("colour", "What colour?", "red", "blue", False),
    answer("colour", "What colour?", "blue", "red", True, "b.png"),
    answer("colour", "What colour?", "blue", "blue", False, "b.png"),
    answer("count", "How many?", "one", "one", True),
    answer("count", "How many?", "one", "two", False),
]


def test_stages_are_fed_by_earlier_ones(folders):
    stages = vision_stages(folders)
    assert [stage.name for stage in stages] == ["pictures", "tokenizer", "tokenize", "train", "answer", "report"]
    made: list = [ROOT / "conf"]
    for stage in stages:
        assert all(any(source.is_relative_to(path) for path in made) for source in stage.inputs), stage.name
        made += stage.outputs


def test_programs_accept_their_commands(folders):
    stages = {stage.name: stage for stage in vision_stages(folders, 7)}
    train = stages["train"].command
    flags = train[train.index("fft/train.py") + 1 :]
    arguments = parse_arguments([str(ROOT / f) if f.startswith("conf/") else f for f in flags])
    assert (arguments.max_steps, arguments.pack, arguments.init) == (7, "best-fit", True)
    args = batch_infer.build_parser().parse_args(list(stages["answer"].command[3:]))
    assert args.image_path == str(folders.pictures / "images")
    job = tokenize_parser().parse_args(list(stages["tokenize"].command[2:]))
    assert (job.task, job.image_path, job.overwrite) == ("chat", args.image_path, True)
    assert "--max_steps" not in next(s for s in vision_stages(folders) if s.name == "train").command


def test_the_directory_belongs_together(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    texts = ["What colour is the circle?", "red", "What is left of the red square?", "green triangle"]
    entries = write_directory(ROOT / MODEL, texts, tmp_path / "start")
    tokenizer, config = (kind.from_pretrained(tmp_path / "start") for kind in (AutoTokenizer, AutoConfig))
    assert len(tokenizer) == entries <= config.get_text_config().vocab_size
    named = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert [getattr(config, name) for name in named] == [4, 2, 3, 5]
    assert tokenizer.eos_token_id == config.get_text_config().eos_token_id == 0
    rules = load_rules(tmp_path / "start", ImageLimits(), (2, 3))
    assert tokens_of(rules, grid_of(rules, PLACES * CELL, PLACES * CELL)) == PLACES**2


def test_scores_by_hand(tmp_path):
    guesses = commonest([("What colour?", "blue"), ("What colour?", "red"), ("How many?", "two")])
    assert guesses == {"What colour?": "blue", "How many?": "two"}
    found = scores(ANSWERS, guesses)
    assert found == [Score("colour", 2, 1, 1, 1), Score("count", 1, 1, 0, 0), Score("all", 3, 2, 1, 1)]
    assert [score.lead for score in found] == [0, 1, pytest.approx(1 / 3)]
    lines = table(found).splitlines()
    assert lines[1].split() == ["colour", "2", "50.0%", "50.0%", "50.0%"]
    assert lines[-1].split() == ["all", "3", "66.7%", "33.3%", "33.3%"]


def test_sheet_is_a_png(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    draw_answers(ANSWERS, tmp_path, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("seen", "code"), [(90, 0), (49, 1)])
def test_exit_code_says_whether_it_sees(folders, monkeypatch, capsys, seen, code):
    facts = {
        "pictures": {"pictures": 9, "questions": 30, "held_out_pictures": 3, "held_out_questions": 100},
        "tokenizer": {"entries": 300},
        "report": {"scores": [vars(Score(kind, 100, seen, 20, 30)) for kind in ("colour", "all")]},
    }
    names = [stage.name for stage in vision_stages(folders)]
    records = {name: Record([], "", "", 2.0, facts.get(name, {})) for name in names}
    for folder in (folders.run, folders.records):
        folder.mkdir(parents=True)
    (folders.run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5.0, "tokens_per_second": 500.0}) + "\n")
    folders.answers.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    monkeypatch.setattr(commands, "run_stages", lambda *_: records)
    monkeypatch.setattr(quickstart, "spark_rate", lambda _: (1000, 100.0))
    assert quickstart.main(["--output", str(folders.output)]) == code
    captured = capsys.readouterr()
    assert f"100   {seen}.0%   20.0%    30.0%" in captured.out
    assert ("it learned too little to see" in captured.err) == bool(code)
