"""What a parameter may be is the same in a notebook and on a command line; an engine must be one that there is."""

import pytest

from fft.errors import UserError
from spark_jobs import get_session, repartition_table, shuffle_tables, tokenize_table
from spark_jobs.runtime.session import user_errors


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("task", "chats", "`task` is 'chats', it must be one of pretrain, chat, preference."),
        ("eos", None, "`eos` is None, it must be one of auto, always, never."),
        ("on_error", "skip", "`on_error` is 'skip', it must be one of fail, quarantine."),
        ("format", "iceberg", "`format` is 'iceberg', it must be one of parquet, delta."),
        ("max_len", 0, "`max_len` is 0, it must be a positive integer."),
        ("max_len", 12.5, "`max_len` is 12.5, it must be a positive integer."),
        ("overwrite", "no", "`overwrite` is 'no', it must be True or False."),
    ],
)
def test_parameters_of_tokenize(name, value, said, tmp_path):
    with pytest.raises(UserError) as raised:
        tokenize_table(tmp_path / "in", tmp_path / "out", tmp_path / "t", **{name: value})
    assert str(raised.value) == said


WEIGHTS = 'it must map names of tables to numbers, as {"web": 0.7} does.'


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weights", "web=0.7", f"`weights` is 'web=0.7', {WEIGHTS}"),
        ("weights", {"web": "0.7"}, f"`weights` is {{'web': '0.7'}}, {WEIGHTS}"),
        ("weights", ["web"], f"`weights` is ['web'], {WEIGHTS}"),
        ("holdout", 1, "`holdout` is 1, it must be a share, from 0 to below 1."),
        ("holdout", float("nan"), "`holdout` is nan, it must be a share, from 0 to below 1."),
        ("seed", "7", "`seed` is '7', it must be an integer."),
        ("num_block", -1, "`num_block` is -1, it must be a positive integer."),
        ("dedup", 1, "`dedup` is 1, it must be True or False."),
    ],
)
def test_parameters_of_shuffle(name, value, said, tmp_path):
    with pytest.raises(UserError) as raised:
        shuffle_tables(tmp_path / "in", tmp_path / "out", **{name: value})
    assert str(raised.value) == said


def test_parameters_of_repartition(tmp_path):
    with pytest.raises(UserError, match="`pack` is 'best', it must be one of best-fit, concat, none"):
        repartition_table(tmp_path, max_len=8, pack="best")
    with pytest.raises(UserError, match="`num_partition` is True, it must be a positive integer"):
        repartition_table(tmp_path, max_len=8, num_partition=True)


def test_paths_that_are_no_utf_8_are_refused(tmp_path):
    odd = f"{tmp_path}/a\udcff"  # as a command line has it
    calls = {
        "`input`": lambda: repartition_table(odd, tmp_path / "out", max_len=8),
        "`inputs`": lambda: tokenize_table(odd, tmp_path / "out", tmp_path / "t"),
        "`output`": lambda: shuffle_tables(tmp_path, odd),
    }
    for name, call in calls.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value) == f"{name}: the name of {tmp_path}/a\\xff is no UTF-8: rename it."


def test_an_engine_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("FFT_ENGINE", "foo")
    with pytest.raises(UserError, match=r"^FFT_ENGINE=foo is no engine: it may be sail, or spark, or be left unset"):
        get_session("test")


@pytest.mark.parametrize(
    ("module", "remedy"), [("fft.corpus", "make dist writes"), ("pyarrow", "install the wheel of make dist")]
)
def test_executors_without_code_are_told_what_to_do(module, remedy):
    """What Spark says of a task whose function cannot be unpickled, in some lines of its stack."""
    said = f"Job aborted.\n  File worker.py\nModuleNotFoundError: No module named '{module}'\n\tat org.x"
    sentence = f"the executors of the cluster cannot import {module}: {remedy}"
    with pytest.raises(UserError, match=sentence) as raised, user_errors():
        raise RuntimeError(said)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "[PYTHON_VERSION_MISMATCH] Python in worker has different version: 3.12 than that in driver: 3.11, PySpark",
            "the workers' Python is 3.12 and the driver's 3.11: have PYSPARK_PYTHON",
        ),
        (
            'java.io.IOException: Cannot run program "/nowhere/python": error=2, No such file or directory',
            "the workers' Python, /nowhere/python, is not there: have PYSPARK_PYTHON name",
        ),
        (
            "SparkException: Python worker exited unexpectedly (crashed).",
            "a Python worker of Spark has ended, killed or",
        ),
    ],
)
def test_workers_that_cannot_work_are_told_of(said, sentence):
    with pytest.raises(UserError, match=sentence), user_errors():
        raise RuntimeError(f"Job aborted.\n  {said}\n\tat org.x")


def test_other_errors_are_what_they_are():
    with pytest.raises(RuntimeError, match="else"), user_errors():
        raise RuntimeError("something else")
