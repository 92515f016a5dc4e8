"""What launchers say of a rank, and what is likely a mistake."""

import json
import os

import numpy as np
import pytest
from conftest import SMALL, VOCAB, write_table

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.planning.preflight import doubts, plan_run
from fft.training.environment import let_memory_grow, world_size

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    def by(**variables):
        for name in (*WHOLE, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return by


def test_ranks_of_a_launcher(launched):
    launched()
    assert world_size() == 1
    launched(**WHOLE)
    assert world_size() == 2
    launched(WORLD_SIZE="1")
    assert world_size() == 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 but RANK is not set: start ranks with torchrun or deepspeed"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4 but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        (WHOLE | {"RANK": "2"}, "RANK=2, LOCAL_RANK=1, WORLD_SIZE=2 in the environment is no rank of a run"),
        (WHOLE | {"RANK": "one"}, "RANK=one"),
    ],
)
def test_variables_that_do_not_fit(variables, said, launched):
    launched(**variables)
    with pytest.raises(UserError) as refused:
        world_size()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seq_len 600 --max_steps 9", ["--seq_len 600 is more than the 512 positions of the model"]),
        ("--max_steps 9 --min_learning_rate 1", ["--min_learning_rate 1 is more than --learning_rate 0.0001"]),
        ("--max_steps 9 --warmup_steps 9", ["--warmup_steps 9 is no less than the run's 9 steps"]),
        ("--max_steps 9 --warmup_steps 8 --seq_len 512", []),
    ],
)
def test_doubts(flags, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    table = write_table(tmp_path / "table", [np.arange(100, dtype=np.int32) % VOCAB] * 20)
    given = (
        f"--init --model {tmp_path}/config.json --train_data {table} --output_dir {tmp_path}/out --seq_len 64 {flags}"
    )
    args = parse_arguments(given.split())
    found = doubts(args, plan_run(args, 1))
    assert [doubt.startswith(start) for doubt, start in zip(found, said, strict=True)] == [True] * len(said)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_allocator_grows_unless_it_is_told_otherwise(name, monkeypatch):
    for each in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    let_memory_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    let_memory_grow()
    assert {each: value for each, value in os.environ.items() if "ALLOC_CONF" in each} == {
        name: "max_split_size_mb:128"
    }
