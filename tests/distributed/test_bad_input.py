"""Bad input ends before any process group exists: one sentence that names the remedy, exit code 2, no traceback."""

import importlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, VOCAB, write_table
from ports import free_port
from samples import read_sample
from thorough import thorough

from fft.arguments import parse_arguments
from fft.data.commits import begin_writing, commit
from fft.data.manifest import FileInfo, Manifest, TokenizerInfo, tokenizer_sha256
from fft.errors import UserError
from fft.planning.preflight import plan_run
from fft.train import cli


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A config and a table that train."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    rng = np.random.default_rng(0)
    write_table(folder / "table", [rng.integers(0, VOCAB, 40).astype(np.int32) for _ in range(20)])
    return folder


def flags(good, output, **changes) -> list[str]:
    """Flags of a run that works, some of them changed."""
    given = {
        "model": good / "config.json",
        "train_data": good / "table",
        "seq_len": 32,
        "max_steps": 1,
        "dtype": "fp32",
        "output_dir": output / "model",
        **changes,
    }
    return ["--init", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def refusal(argv, world=1) -> str:
    with pytest.raises(UserError) as raised:
        plan_run(parse_arguments(argv), world)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def foreign(folder, columns: dict) -> None:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "part-0.parquet")


def manifest_of(folder, **facts) -> Manifest:
    files = tuple(FileInfo(p.name, 10, 400, p.stat().st_size) for p in sorted(folder.glob("*.parquet")))
    return Manifest(files, 20, 800, **{"tokenizer": None, "seq_len": None, "seed": None, "lineage": {}, **facts})


def test_the_flags_these_tests_start_from_are_accepted(good, tmp_path):
    assert plan_run(parse_arguments(flags(good, tmp_path)), 1).total_steps == 1


@pytest.mark.parametrize("flag", ["train_data", "eval_data"])
def test_missing_table(good, tmp_path, flag):
    said = refusal(flags(good, tmp_path, **{flag: tmp_path / "nowhere"}))
    assert f"{tmp_path / 'nowhere'} does not exist: give a folder of parquet files" in said


def test_missing_model(good, tmp_path):
    assert "does not exist: give a Hugging Face model directory" in refusal(
        flags(good, tmp_path, model=tmp_path / "no")
    )


def test_model_directory_that_is_none(good, tmp_path):
    assert "has no config.json" in refusal(flags(good, tmp_path, model=good / "table"))


def test_config_that_is_none(good, tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    assert "is not a model configuration" in refusal(flags(good, tmp_path, model=tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "nonsense"}, "model_type is 'nonsense', which transformers does not know"),
        ({"vocab_size": "many"}, "'vocab_size' expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ],
)
def test_config_with_bad_values(good, tmp_path, change, said):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL | {"model_type": "llama"} | change))
    assert said in refusal(flags(good, tmp_path, model=config))


def test_weights_missing(good, tmp_path):
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    argv = [flag for flag in flags(good, tmp_path, model=tmp_path) if flag != "--init"]
    assert "safetensors" in refusal(argv)


def test_tokenizer_directory_that_is_none(good, tmp_path):
    said = refusal(flags(good, tmp_path, tokenizer=good / "table"))
    assert f"--tokenizer {good / 'table'} is no tokenizer directory" in said


def test_empty_folder(good, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no parquet files" in refusal(flags(good, tmp_path, train_data=tmp_path / "empty"))


def test_table_without_rows(good, tmp_path):
    foreign(tmp_path / "table", {"input_ids": pa.array([], pa.list_(pa.int32()))})
    assert "holds no tokens" in refusal(flags(good, tmp_path, train_data=tmp_path / "table"))


def test_table_without_input_ids(good, tmp_path):
    foreign(tmp_path / "table", {"text": ["a"], "id": ["b"]})
    said = refusal(flags(good, tmp_path, train_data=tmp_path / "table"))
    assert "part-0.parquet has no column input_ids (it has id, text): make a token table with" in said


@pytest.mark.parametrize("value", ["1 2 3", [1.0, float("nan")], 5])
def test_input_ids_of_another_type(good, tmp_path, value):
    foreign(tmp_path / "table", {"input_ids": [value]})
    assert "must be a list of integers" in refusal(flags(good, tmp_path, train_data=tmp_path / "table"))


@pytest.mark.parametrize("column", ["labels", "cu_seqlens"])
def test_columns_of_that_name_but_another_type(good, tmp_path, column):
    foreign(tmp_path / "table", {"input_ids": [[1, 2, 3]], column: [7]})
    said = refusal(flags(good, tmp_path, train_data=tmp_path / "table"))
    assert f"part-0.parquet: column {column} is int64, it must be a list of integers: drop or rename it" in said


@pytest.mark.parametrize("labelled", [0, 1])
def test_files_with_and_without_labels(good, tmp_path, labelled):
    """Labels of some files must neither be ignored in the others nor end in a traceback of the loader."""
    foreign(tmp_path / "table", {"input_ids": [[1, 2, 3]]} | ({"labels": [[1, 2, 3]]} if labelled else {}))
    other = {"input_ids": [[1, 2, 3]]} | ({} if labelled else {"labels": [[1, 2, 3]]})
    pq.write_table(pa.table(other), tmp_path / "table" / "part-1.parquet")
    said = refusal(flags(good, tmp_path, train_data=tmp_path / "table"))
    assert f"part-{1 - labelled}.parquet has a column labels, " in said
    assert f"part-{labelled}.parquet has none: keep tables of different kinds in folders of their own" in said


def test_a_file_that_is_no_parquet(good, tmp_path):
    (tmp_path / "texts.csv").write_text("text\na\n")
    assert "is no readable parquet file" in refusal(flags(good, tmp_path, train_data=tmp_path / "texts.csv"))


def test_unfinished_table(good, tmp_path):
    table = write_table(tmp_path / "table", [np.arange(40, dtype=np.int32)] * 4)
    begin_writing(table, {})
    assert "is unfinished" in refusal(flags(good, tmp_path, train_data=table))


def test_table_changed_after_it_was_written(good, tmp_path):
    table = write_table(tmp_path / "table", [np.arange(40, dtype=np.int32)] * 20)
    commit(table, manifest_of(table))
    (table / "part-00001.parquet").unlink()
    assert "part-00001.parquet is in the table's manifest but is missing" in refusal(
        flags(good, tmp_path, train_data=table)
    )


def test_vocabulary_larger_than_the_models(good, tmp_path):
    table = write_table(tmp_path / "table", [np.arange(40, dtype=np.int32)] * 20)
    commit(table, manifest_of(table, tokenizer=TokenizerInfo("other", "0" * 64, VOCAB + 1, {})))
    said = refusal(flags(good, tmp_path, train_data=table))
    assert f"a vocabulary of {VOCAB + 1}, larger than the model's {VOCAB}: raise vocab_size" in said


def test_table_of_another_tokenizer(good, tmp_path):
    """The vocabulary is as large as the model's; only the hash tells that the ids mean something else."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "tokenizer" / name).write_text("{}")
    table = write_table(tmp_path / "table", [np.arange(40, dtype=np.int32)] * 20)
    for sha256, fits in ((tokenizer_sha256(tmp_path / "tokenizer"), True), ("0" * 64, False)):
        commit(table, manifest_of(table, tokenizer=TokenizerInfo("other", sha256, VOCAB)))
        argv = flags(good, tmp_path, train_data=table, tokenizer=tmp_path / "tokenizer")
        if fits:
            plan_run(parse_arguments(argv), 1)
        else:
            assert f"{table} was tokenized with other, not with the tokenizer in {tmp_path}" in refusal(argv)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("input_ids", VOCAB, "token id"),
        ("input_ids", -1, "token id"),
        ("labels", VOCAB, "label"),
        ("labels", -1, "label"),
    ],
)
def test_ids_outside_the_vocabulary(good, tmp_path, column, value, named):
    """Found when a row group is read; -100 marks tokens that are not trained on and stays allowed."""
    foreign(tmp_path / "table", {"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], column: [[1, 2, value]]})
    reader = plan_run(parse_arguments(flags(good, tmp_path, train_data=tmp_path / "table")), 1).train
    with pytest.raises(UserError) as raised:
        read_sample(reader, 0)
    assert f"row group 0 holds {named} {value}, outside the model's vocabulary of {VOCAB}: tok" in str(raised.value)


@pytest.mark.parametrize(("world", "sizes"), [(3, {"pipe_parallel_size": 2}), (2, {"pipe_parallel_size": 4})])
def test_world_that_the_sizes_do_not_divide(good, tmp_path, world, sizes):
    assert "cannot be divided by --pipe_parallel_size" in refusal(flags(good, tmp_path, **sizes), world)


def test_what_this_release_lacks_is_refused_by_name(good, tmp_path):
    assert "--encoder_pipe_parallel_size" in refusal(flags(good, tmp_path, encoder_pipe_parallel_size=2), 2)


def test_heads_that_ranks_cannot_share_are_refused(good, tmp_path):
    assert "--model_parallel_size 3 cannot share out 4" in refusal(flags(good, tmp_path, model_parallel_size=3), 3)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"sequence_parallel_size": 3}, "--sequence_parallel_size 3 must divide the 32 tokens of a micro-batch"),
        (
            {"sequence_parallel_size": 2, "ulysses_degree": 3},
            "--ulysses_degree 3 must divide --sequence_parallel_size 2",
        ),
        ({"sequence_parallel_size": 4, "ulysses_degree": 4}, "must divide the 2 key/value heads of a rank"),
    ],
)
def test_shares_of_a_row_that_cannot_be(good, tmp_path, sizes, sentence):
    world = sizes["sequence_parallel_size"]
    assert sentence in refusal(flags(good, tmp_path, **sizes), world)


def test_existing_output_is_kept(good, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").touch()
    assert "--overwrite" in refusal(flags(good, tmp_path))


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint"])
def test_output_that_is_a_file(good, tmp_path, flag):
    (tmp_path / "notes.txt").touch()
    assert f"--{flag} {tmp_path / 'notes.txt'} is a file" in refusal(
        flags(good, tmp_path, **{flag: tmp_path / "notes.txt"})
    )


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint"])
@pytest.mark.parametrize(
    ("make", "place", "said"),
    [
        (lambda folder: (folder / "notes").touch(), "notes/below/it", "cannot be made (Not a directory)"),
        (lambda folder: (folder / "link").symlink_to("nowhere"), "link", "is a link to nowhere, which does not exist"),
        (lambda folder: None, "x" * 300, "cannot be made (File name too long)"),
        (lambda folder: None, "/proc/model", "cannot be made (No such file or directory)"),  # nor by root
    ],
)
def test_outputs_that_cannot_be_made(good, tmp_path, flag, make, place, said):
    """Before texts are tokenized, weights are read, steps are taken; trying leaves nothing."""
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert f"--{flag} {tmp_path / place} {said}" in refusal(flags(good, tmp_path, **{flag: tmp_path / place}))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint"])
@pytest.mark.parametrize("below", ["", "model"])
def test_a_checkpoint_is_not_replaced(good, tmp_path, flag, below):
    """Of any run; --overwrite is for the folders that were asked for, not for what another run goes on from."""
    checkpoint = tmp_path / "run" / "step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "SHA256SUMS").touch()
    said = refusal([*flags(good, tmp_path, **{flag: checkpoint / below}), "--overwrite"])
    assert f"would replace or change the checkpoint {checkpoint}: choose another folder" in said


def test_a_folder_with_checkpoints_is_no_output(good, tmp_path):
    """Another run's folder is not replaced by a model, --overwrite or not."""
    state = tmp_path / "runs" / "run" / "step-2" / "training" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    for output in (tmp_path / "runs", tmp_path / "runs" / "run"):
        said = refusal([*flags(good, tmp_path, output_dir=output), "--overwrite"])
        assert f"would replace or change the checkpoint {state.parent.parent}: choose another folder" in said


@pytest.mark.parametrize("name", ["step-2", "tokens", "tensorboard/model", "latest", ".step-2.old"])
def test_the_model_is_not_written_over_what_the_run_keeps(good, tmp_path, name):
    argv = flags(good, tmp_path, checkpoint=tmp_path / "run", output_dir=tmp_path / "run" / name)
    assert f"is a name that the run in --checkpoint {tmp_path / 'run'} uses" in refusal(argv)
    assert plan_run(parse_arguments(flags(good, tmp_path, checkpoint=tmp_path, output_dir=tmp_path / "model")), 1)


def test_overwriting_never_takes_what_the_run_needs(good, tmp_path):
    """--overwrite replaces --output_dir as a whole and removes the run folder's checkpoints."""
    said = refusal([*flags(good, tmp_path, output_dir=good, eval_data=good / "table"), "--overwrite"])
    assert f"--output_dir would replace {good} and with it" in said
    blend = f"{good / 'table'}:0.7 {tmp_path / 'web'}@v3:0.3"
    said = refusal([*flags(good, tmp_path, output_dir=tmp_path / "web", train_data=blend), "--overwrite"])
    assert f"{tmp_path / 'web'} of --train_data: choose another folder" in said
    run = tmp_path / "run"
    assert f"{run} of --checkpoint" in refusal(flags(good, tmp_path, output_dir=run, checkpoint=run))
    (run / "step-2").mkdir(parents=True)
    (run / "step-2" / "config.json").write_text((good / "config.json").read_text())
    again = ["--from_ckpt", run, "--checkpoint", run, "--train_data", good / "table", "--seq_len", 32, "--overwrite"]
    assert f"--checkpoint would replace {run / 'step-2'}" in refusal([str(part) for part in again])


def test_a_model_may_be_trained_in_place(good, tmp_path):
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    argv = [*flags(good, tmp_path, model=tmp_path, output_dir=tmp_path), "--overwrite"]
    assert plan_run(parse_arguments(argv), 1).total_steps == 1


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [("seq_length: 128\n", "unknown setting 'seq_length' (did you mean 'seq_len'?)"), ("seq_len: [1\n", "is not YAML")],
)
def test_bad_settings_file(good, tmp_path, yaml, sentence):
    (tmp_path / "run.yaml").write_text(yaml)
    said = refusal(flags(good, tmp_path, config=tmp_path / "run.yaml"))
    assert f"--config {tmp_path / 'run.yaml'}" in said
    assert sentence in said


@pytest.mark.parametrize("case", ["table", "model", "settings", "output"])
def test_the_command_ends_with_the_sentence_alone(good, tmp_path, case, monkeypatch, capsys):
    """The whole command in this process: exit code 2, one line on stderr, nothing on stdout, nothing written."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "run.yaml").write_text("pipe_size: 2\n")
    changes = {
        "table": {"train_data": tmp_path / "given" / "nowhere"},
        "model": {"model": tmp_path / "given" / "nowhere"},
        "settings": {"config": tmp_path / "given" / "run.yaml"},
        "output": {"output_dir": tmp_path / "given"},
    }[case]
    monkeypatch.setattr("sys.argv", ["fft/train.py", *flags(good, tmp_path, **changes)])
    importlib.import_module("fft.training.engine")  # on a CPU, DeepSpeed says so when it is imported
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(tmp_path / "given") in err
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize(
    ("launcher", "case"),
    [
        ("python", "missing"),
        thorough("torchrun", "missing"),
        ("torchrun", "ids"),
        thorough("torchrun", "kernel"),
        ("deepspeed", "indivisible"),
        thorough("deepspeed", "ids"),
    ],
)
@pytest.mark.slow
def test_launchers_end_with_one_sentence(launcher, case, good, launch, tmp_path):
    port = str(free_port())
    ranks = {"python": 1, "torchrun": 2, "deepspeed": 3}[launcher]
    start = {
        "python": ["python", "-m", "fft.train"],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", port, "fft/train.py"],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port, "fft/train.py"],
    }[launcher]
    wild = write_table(tmp_path / "wild", [np.full(40, VOCAB, np.int32)] * 20)
    changes, sentence = {
        "missing": ({"train_data": tmp_path / "nowhere"}, f"error: {tmp_path / 'nowhere'} does not exist: give"),
        "kernel": ({"attention": "npu"}, "error: --attention npu runs on npu in bfloat16 or float16, not on cpu in"),
        "indivisible": ({"pipe_parallel_size": 2}, "error: the world of 3 rank(s) cannot be divided by"),
        "ids": (
            {"train_data": wild, "pipe_parallel_size": ranks},
            f"outside the model's vocabulary of {VOCAB}: tokenize",
        ),
    }[case]
    done = launch(*start, *flags(good, tmp_path, **changes))
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    # torchrun always adds a traceback of its own, the ranks print none; its report names our sentence as the cause.
    assert done.stderr.count("Traceback") == (1 if launcher == "torchrun" else 0)
    if launcher == "torchrun":
        cause = done.stderr.partition("Root Cause")[2]
        assert sentence.removeprefix("error: ") in cause
    assert not (tmp_path / "model").exists()


def test_unknown_flag_is_named(launch):
    done = launch("python", "-m", "fft.train", "--pipe_size", "2")
    assert done.returncode == 2
    assert "--pipe_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_texts_that_cannot_be_read_are_refused_before_any_is_tokenized(good, tmp_path):
    given = {"eval_data": f"{tmp_path}/a.jsonl {tmp_path}/b.jsonl"}
    assert "an evaluation reads one table" in refusal(flags(good, tmp_path, **given))
    said = refusal(flags(good, tmp_path, train_data="s3://lake/chats.jsonl"))
    assert said.startswith("--train_data s3://lake/chats.jsonl: JSON lines are read from local or mounted folders")
