import json

import pytest
from conftest import ROOT

from fft.arguments import parse_arguments
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.quickstart import __main__ as quickstart
from fft.quickstart import commands
from fft.quickstart.plan import MODEL, PROMPTS, SEQ_LEN, VOCAB_SIZE, Folders, build_stages
from fft.quickstart.stages import Record


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "out")


def test_stages_are_fed_by_earlier_ones(folders):
    stages = build_stages(folders)
    names = ["corpus", "tokenizer", "tokenize", "shuffle", "repartition", "train", "generate", "report"]
    assert [stage.name for stage in stages] == names
    made: list = [ROOT / "conf"]
    for stage in stages:
        assert all(any(source.is_relative_to(path) for path in made) for source in stage.inputs), stage.name
        made += stage.outputs


def test_the_trainer_accepts_its_command(folders):
    train = next(stage for stage in build_stages(folders, 7) if stage.name == "train")
    flags = train.command[train.command.index("fft/train.py") + 1 :]
    arguments = parse_arguments([str(ROOT / f) if f.startswith("conf/") else f for f in flags])
    assert (arguments.max_steps, arguments.pipe_parallel_size, arguments.seq_len) == (7, 2, SEQ_LEN)
    assert arguments.init
    assert "--max_steps" not in next(s for s in build_stages(folders) if s.name == "train").command


def test_the_model_fits_tokenizer_and_rows():
    config = json.loads((ROOT / MODEL).read_text())
    assert config["vocab_size"] == VOCAB_SIZE
    assert config["max_position_embeddings"] >= SEQ_LEN


@pytest.mark.parametrize(("reached", "code"), [(5.4, 0), (5.6, 1)])
def test_exit_code_says_whether_the_baseline_was_beaten(folders, monkeypatch, capsys, reached, code):
    for table in ("tokens", "shuffled/train", "shuffled/validation", "packed/train", "packed/validation"):
        folder = folders.output / table
        folder.mkdir(parents=True)
        files = (FileInfo("part-0.parquet", 1, 1000, 10),)
        commit(folder, Manifest(files, 1, 1000, lineage={"timing": {"seconds": 1.0, "tokens_per_second": 1000.0}}))
    folders.run.mkdir()
    metrics = [{"step": 0, "eval_loss": 8.0}, {"step": 1, "loss": 8.0, "tokens_per_second": 500.0}]
    metrics.append({"step": 1, "eval_loss": reached})
    (folders.run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    folders.completions.write_text(json.dumps({"prompt": PROMPTS[0], "text": "    return 1"}) + "\n")
    folders.records.mkdir()
    facts = {
        "corpus": {"documents": 3, "bytes": 5_000_000, "undecodable": 1},
        "tokenizer": {"entries": VOCAB_SIZE},
        "report": {"baseline": 6.5},
    }
    names = [stage.name for stage in build_stages(folders)]
    records = {name: Record([], "", "", 2.0, facts.get(name, {})) for name in names}
    monkeypatch.setattr(commands, "run_stages", lambda *_: records)
    assert quickstart.main(["--output", str(folders.output)]) == code
    captured = capsys.readouterr()
    assert "shuffle              2.0  2,000 tokens, 1,000 tokens/s" in captured.out
    assert ("the model learned too little" in captured.err) == bool(code)
