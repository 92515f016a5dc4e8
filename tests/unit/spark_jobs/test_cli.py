"""The jobs' command lines: what they hand to the functions that do the work."""

import pytest

import spark_jobs
from fft.errors import Parser, UserError
from spark_jobs import repartition_table
from spark_jobs.cli import run_repartition, run_shuffle


@pytest.mark.parametrize(
    ("command", "job", "flags", "meant"),
    [
        (run_shuffle, "shuffle_tables", "-d a b -n 64", {"inputs": ["a", "b"], "num_block": 64}),
        (run_repartition, "repartition_table", "-d a -n 8 --max_len 512", {"input": "a", "num_partition": 8}),
    ],
)
def test_the_short_flags_of_jllm_mean_what_they_do_there(monkeypatch, command, job, flags, meant):
    calls = []
    monkeypatch.setitem(vars(spark_jobs), job, lambda **named: calls.append(named))
    command([*flags.split(), "-o", "out"])
    (named,) = calls
    assert (meant | {"output": "out"}).items() <= named.items()


def test_an_error_names_parameters_in_a_notebook_and_flags_on_the_command_line(tmp_path):
    sentence = "without {} .* itself is replaced: allow that with {}, or give a folder with {}"
    with pytest.raises(UserError, match=sentence.format("`output`", "`overwrite=True`", "`output`")):
        repartition_table(tmp_path, max_len=8)
    with pytest.raises(UserError, match=sentence.format("-o", "--overwrite", "-o")):
        run_repartition(["-i", str(tmp_path), "--max_len", "8"])
    missing = tmp_path / "none"
    with pytest.raises(UserError, match=f"^`input` {missing} does not exist"):
        repartition_table(missing, tmp_path / "out", max_len=8)
    with pytest.raises(UserError, match=f"^-i {missing} does not exist"):
        run_repartition(["-i", str(missing), "-o", str(tmp_path / "out"), "--max_len", "8"])


def test_only_parameters_of_the_command_line_become_flags():
    parser = Parser()
    parser.add_argument("--format", dest="table_format")
    with pytest.raises(UserError) as caught, parser.naming_flags():
        raise UserError('`lake`.`x`, `other=True`: give `table_format="delta"`, or another `table_format`.')
    assert str(caught.value) == "`lake`.`x`, `other=True`: give --format delta, or another --format."
