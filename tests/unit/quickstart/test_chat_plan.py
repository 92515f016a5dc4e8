import json
import re

import pytest
from conftest import ROOT

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.quickstart import commands
from fft.quickstart.chat import __main__ as quickstart
from fft.quickstart.chat import inputs, orders, scores
from fft.quickstart.chat.plan import ChatFolders, chat_stages
from fft.quickstart.stages import Record
from fft.serve import batch_infer


@pytest.fixture
def folders(tmp_path):
    return ChatFolders(tmp_path / "out")


def test_stages_are_fed_by_earlier_ones(folders):
    stages = chat_stages(folders)
    assert [stage.name for stage in stages] == ["inputs", "base", "before", "adapter", "merge", "after"]
    made: list = [ROOT / "conf"]
    for stage in stages:
        assert all(any(source.is_relative_to(path) for path in made) for source in stage.inputs), stage.name
        made += stage.outputs


def test_programs_accept_their_commands(folders, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage.command for stage in chat_stages(folders, 7)}
    base, adapter = (parse_arguments(stages[name][3:]) for name in ("base", "adapter"))
    assert (base.init, base.max_steps, base.lora_dim) == (True, 7, 0)
    assert (adapter.init, adapter.max_steps, adapter.lora_dim) == (False, 7, 16)
    assert adapter.model == base.output_dir
    for name in ("before", "after"):
        assert batch_infer.build_parser().parse_args(stages[name][3:]).prompt_key == "messages"
    assert all("--max_steps" not in stage.command for stage in chat_stages(folders))


def test_the_page_has_the_commands_of_the_stages():
    text = (ROOT / "docs" / "first-fine-tune.md").read_text().replace("\\\n", " ")
    typed = [line.split() for line in text.splitlines() if line.startswith("python -m")]
    for stage in chat_stages(ChatFolders(ROOT / "runs" / "first")):
        assert list(stage.command) in typed, stage.name


def test_conversations_have_a_rule_and_hold_orders_out(tmp_path):
    orders.write_conversations(tmp_path, 40, 60, 30, 3)
    talk, chats, validation, asked = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in (orders.TALK, orders.CHATS, orders.VALIDATION, orders.ASKED)
    )
    assert (len(talk), len(chats), len(validation), len(asked)) == (40, 60, 30, 30)
    said = {row["messages"][0]["content"] for row in (*talk, *chats, *validation)}
    assert not said & {row["messages"][0]["content"] for row in asked}
    for question, answer in (row["messages"] for row in chats):
        things = re.split(r", | and ", question["content"].removeprefix("I want ").removesuffix("."))
        lines = [f"- {orders.NUMBERS.index(n) + 2} {name}, {colour}" for n, colour, name in map(str.split, things)]
        assert answer["content"].splitlines() == lines
    before = (tmp_path / orders.CHATS).read_bytes()
    orders.write_conversations(tmp_path, 40, 60, 30, 3)
    assert (tmp_path / orders.CHATS).read_bytes() == before


def test_inputs_belong_together(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    given = [str(tmp_path), "--talks", "30", "--chats", "30", "--held_out", "5"]
    assert inputs.main(given) == 0
    tokenizer, config = (kind.from_pretrained(tmp_path / "start") for kind in (AutoTokenizer, AutoConfig))
    assert len(tokenizer) <= config.vocab_size
    assert tokenizer.eos_token_id == config.eos_token_id == 0
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 0
    with pytest.raises(UserError, match="--overwrite"):
        inputs.main(given)
    assert inputs.main([*given, "--overwrite"]) == 0


def row(text, answer="- 2 lamps, red"):
    return {"prompt": [{"role": "user", "content": "I want two red lamps."}], "answer": answer, "text": text}


def test_scores_by_hand(tmp_path, capsys):
    path = tmp_path / "after.jsonl"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in (row("- 2 lamps, red\n"), row("- 3 lamps, red"), row("")))
    )
    assert scores.main([str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{path}: 1 of 3 right", "  I want two red lamps.", '  "- 2 lamps, red"']
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="without prompt, answer and text"):
        scores.main([str(path)])
    with pytest.raises(UserError, match="cannot be read"):
        scores.main([str(tmp_path / "none")])


@pytest.mark.parametrize(("right", "code"), [(190, 0), (189, 1)])
def test_exit_code_says_whether_it_learned(folders, monkeypatch, capsys, right, code):
    facts = {"before": {"right": 0, "asked": 200}, "after": {"right": right, "asked": 200}}
    records = {stage.name: Record([], "", "", 2.0, facts.get(stage.name, {})) for stage in chat_stages(folders)}
    for folder in (folders.run, folders.base_run, folders.records):
        folder.mkdir(parents=True)
    for run in (folders.run, folders.base_run):
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5.0, "tokens_per_second": 500.0}) + "\n")
    for path in (folders.before, folders.after):
        path.write_text(json.dumps(row("x")) + "\n")
    monkeypatch.setattr(commands, "run_stages", lambda *_: records)
    assert quickstart.main(["--output", str(folders.output)]) == code
    captured = capsys.readouterr()
    assert f"{right} of 200 right" in captured.out
    assert ("the model learned too little" in captured.err) == bool(code)
