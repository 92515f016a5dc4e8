"""The jobs' command lines: what they hand to the functions that do the work."""

import pytest

import spark_jobs
from spark_jobs.cli import repartition, shuffle


@pytest.mark.parametrize(
    ("command", "job", "flags", "inputs", "files"),
    [
        (shuffle, "shuffle_tables", ["-d", "a", "b", "-n", "64"], ["a", "b"], {"num_block": 64}),
        (repartition, "repartition_table", ["-d", "a", "-n", "8", "--max_len", "512"], "a", {"num_partition": 8}),
    ],
)
def test_the_short_flags_of_jllm_mean_what_they_do_there(monkeypatch, command, job, flags, inputs, files):
    calls = []
    monkeypatch.setitem(vars(spark_jobs), job, lambda *given, **named: calls.append((given, named)))
    command([*flags, "-o", "out"])
    (given, named), *others = calls
    assert (given, others) == ((inputs, "out"), [])
    assert files.items() <= named.items()
