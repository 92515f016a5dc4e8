"""Two processes train on conversations in a .jsonl, without Spark: the file is all that they are given."""

import json

import pytest
from conftest import SMALL
from conversations import write_chats
from forked import run_ranks, started
from spark.chat_templates import save_chat_tokenizer
from test_crashes import outcome, wait_until
from thorough import thorough
from transformers import AutoTokenizer

from fft.checkpoint.folder import LATEST
from fft.data.manifest import read_manifest

pytestmark = pytest.mark.slow
MODULE = "tests.distributed.without_spark"
STEPS, HALF = 12, 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen2.5", "qwen2.5")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    file.write_text(json.dumps(SMALL | {"model_type": "llama", "vocab_size": vocabulary}))
    return file


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 2000)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("few") / "few.jsonl", 30, seed=1)


def flags(model, tokenizer, chats, few, output):
    return (
        f"--init --model {model} --tokenizer {tokenizer} --train_data {chats} --eval_data {few} --seq_len 256 "
        f"--max_steps {STEPS} --learning_rate 1e-2 --dtype fp32 --pack best-fit --gradient_accumulation_steps 4 "
        f"--save_steps {HALF} --logging_steps 1 --checkpoint {output}/run --output_dir {output}/model --resume auto"
    ).split()


@pytest.mark.parametrize("layout", ["--pipe_parallel_size 2", thorough("--pipe_parallel_size 1")])
def test_trained_killed_and_gone_on_with(layout, model, tokenizer, chats, few, tmp_path):
    given = [*flags(model, tokenizer, chats, few, tmp_path / "straight"), *layout.split()]
    done = run_ranks(2, *given, module=MODULE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("chat data") == 2  # of each file once, for both ranks
    (table,) = (tmp_path / "straight" / "run" / "tokens").glob("chats-*")
    assert read_manifest(table).lineage["counts"]["documents_out"] == 2000

    given = [*flags(model, tokenizer, chats, few, tmp_path / "killed"), *layout.split()]
    with started(2, *given, module=MODULE) as (processes, _):
        run = tmp_path / "killed" / "run"
        wait_until(lambda: (run / LATEST).is_file(), _polled(processes))
        for process in processes:
            process.kill()
    assert not (tmp_path / "killed" / "model").exists()
    done = run_ranks(2, *given, module=MODULE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {run}/step-{HALF}" in done.stderr + done.stdout
    assert "chat data" not in done.stderr  # nothing is tokenized twice
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")


class _polled:
    def __init__(self, processes):
        self._processes = processes

    def poll(self):
        return None if all(p.is_alive() for p in self._processes) else 1


def test_a_bad_line_is_named_before_anything_starts(model, tokenizer, chats, few, tmp_path):
    path = tmp_path / "some.jsonl"
    good = chats.read_text(encoding="utf-8").splitlines(keepends=True)[:500]
    path.write_text("".join([*good, '[{"user": "and then?"}]\n']), encoding="utf-8")
    done = run_ranks(2, *flags(model, tokenizer, path, few, tmp_path), module=MODULE)
    assert done.returncode == 2
    assert f"error: {path}, line 501: no assistant turn" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_vocabulary_that_is_too_small_is_found_before_tokenizing(model, tokenizer, chats, few, tmp_path):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(json.loads(model.read_text()) | {"vocab_size": 50}))
    done = run_ranks(1, *flags(small, tokenizer, chats, few, tmp_path), module=MODULE)
    assert done.returncode == 2
    assert "larger than the model's 50" in done.stderr
    assert not (tmp_path / "run" / "tokens").exists()


def test_machines_whose_files_differ_do_not_train(model, tokenizer, chats, tmp_path):
    """Each rank works in a folder of its own, where a file of the same name holds other conversations."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_chats(tmp_path / str(rank) / "own.jsonl", 20, seed=rank)
    given = flags(model, tokenizer, "own.jsonl", "own.jsonl", tmp_path)
    given[given.index("--checkpoint") + 1] = "run"
    done = run_ranks(2, tmp_path, *given, module="tests.distributed.apart")
    assert done.returncode == 2
    assert "error: --train_data or --eval_data of rank 1 is not that of rank 0: give all machines" in done.stderr


def test_text_needs_a_tokenizer(model, chats, tmp_path):
    given = ["--init", "--model", model, "--train_data", chats, "--max_steps", 1, "--output_dir", tmp_path / "model"]
    done = run_ranks(1, *given, module=MODULE)
    assert done.returncode == 2
    assert (
        f"error: --train_data {chats} is text, and --model has no tokenizer: name one with --tokenizer." in done.stderr
    )
