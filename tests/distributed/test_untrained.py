"""Tables of which nothing is learned: no model of them is ever written, and steps without a trained token are told."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, write_table
from forked import run_ranks

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.planning.preflight import plan_run

SEQ_LEN = 8


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    given = ["--init", "--model", tmp_path / "config.json", "--train_data", tmp_path / "table", "--dtype", "fp32"]
    return [*map(str, given), "--seq_len", str(SEQ_LEN), "--output_dir", str(tmp_path / "model")]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [[1]] * 9}, "every document is one token"),
        ({"input_ids": [[1, 2]] * 9, "labels": [[-100, -100]] * 9}, "all labels are -100"),
        ({"input_ids": [[1, 2]] * 9, "attention_mask": [[1, 0]] * 9}, "some tokens are padding"),
    ],
)
def test_what_the_footers_tell_is_refused_before_anything_starts(columns, said, flags, tmp_path):
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "table" / "part.parquet")
    with pytest.raises(UserError, match=said):
        plan_run(parse_arguments(flags), 1)


@pytest.mark.slow
def test_a_first_step_that_trains_on_nothing_ends_the_run(flags, tmp_path):
    """Boundaries around every token: footers do not tell."""
    (tmp_path / "table").mkdir()
    bounds = [list(range(SEQ_LEN + 1))] * 9
    table = pa.table({"input_ids": [[1] * SEQ_LEN] * 9, "cu_seqlens": bounds})
    pq.write_table(table, tmp_path / "table" / "part.parquet")
    done = run_ranks(2, *flags, "--pipe_parallel_size", 2)
    assert done.returncode == 2
    assert "error: step 1: none of its tokens is trained on" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_later_step_that_trains_on_nothing_is_told(flags, tmp_path):
    """The table's last sample is what is left over: one token."""
    write_table(tmp_path / "table", [np.arange(2 * SEQ_LEN + 1, dtype=np.int32)], files=1)
    done = run_ranks(1, *flags, "--shuffle_lanes", 1)
    assert done.returncode == 0, done.stderr
    assert "warning: step 3: none of its tokens is trained on" in done.stderr
    assert done.stderr.count("warning: step") == 1
    assert (tmp_path / "model").exists()
