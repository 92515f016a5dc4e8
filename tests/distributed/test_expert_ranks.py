"""Experts spread over real ranks, by gloo, against one process that has all of them."""

import json

import pytest
from forked import run_ranks

TOLERANCE = {"eager": 1e-12, "grouped_mm": 1e-5}  # in float64, in float32


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_what_one_process_would(world):
    """Also where a rank has no tokens, and where all go to one expert; nothing is exchanged again by recomputation."""
    done = run_ranks(world, module="tests.distributed.expert_ranks")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 3 * 2 * 8
    for result in results:
        assert result["error"] <= TOLERANCE[result["experts"]], result
        assert result["exchanges"] == 7, result  # counts, rows, weights, what comes back; three of these backward
