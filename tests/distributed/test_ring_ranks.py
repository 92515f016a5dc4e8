"""Ring attention, and Ulysses before it, between real processes over gloo, against one process doing the whole row."""

import json

import pytest
from forked import run_ranks

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.mark.parametrize(
    ("world", "group", "degrees"),
    [(2, 2, [1, 2]), (3, 3, [1]), (4, 4, [1, 2, 4]), (4, 2, [1])],
    ids=["2", "3", "4", "two groups of 2"],
)
def test_ranks_compute_what_one_process_would(world, group, degrees):
    done = run_ranks(world, json.dumps(degrees), group, module="tests.distributed.ring_ranks")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    refusals = {result["degree"]: result["refusal"] for result in results if "refusal" in result}
    probes = [result for result in results if "leaks" in result]
    assert [probe["degree"] for probe in probes] == degrees
    for probe in probes:
        assert probe["leaks"] == [0, 0, 0, 0]
        assert max(probe["bf16"]) <= 1.25, probe
    results = [result for result in results if "errors" in result]
    assert set(refusals) == set(degrees) - {1}
    for degree, sentence in refusals.items():
        assert sentence == f"--ulysses_degree {degree} must divide the 1 key/value heads of a rank."
    assert len(results) == len(degrees) * 4 * len(TOLERANCE)
    for result in results:
        assert max(result["errors"]) <= TOLERANCE[result["dtype"]], result
