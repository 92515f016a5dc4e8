"""A run ends when validation losses have stopped falling, also when it was interrupted in between."""

import json

import pytest
from unit.test_arguments import BASE

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.training.early_stop import EarlyStop

LOSSES = [3.0, 2.0, 2.5, 1.5, 1.5, float("nan"), 1.6, 1.0]


def stops_after(stop, losses):
    """Number of losses it takes."""
    for number, loss in enumerate(losses, start=1):
        stop.see(loss)
        if stop.over:
            return number
    return None


@pytest.mark.parametrize(("patience", "after"), [(1, 3), (2, 6), (3, 7), (4, None), (0, None)])
def test_patience(patience, after):
    assert stops_after(EarlyStop(patience), LOSSES) == after


@pytest.mark.parametrize("interrupted", range(6))
def test_state_survives_json(interrupted):
    before = EarlyStop(3)
    assert stops_after(before, LOSSES[:interrupted]) is None
    after = EarlyStop.from_state(3, json.loads(json.dumps(before.state(), allow_nan=False)))
    assert after == before
    assert stops_after(after, LOSSES[interrupted:]) == 7 - interrupted


def test_what_had_no_number_yet_still_counts_after_an_interruption():
    before = EarlyStop(3)
    assert stops_after(before, [float("nan")] * 2) is None
    after = EarlyStop.from_state(3, json.loads(json.dumps(before.state(), allow_nan=False)))
    assert (after.best, after.stalled) == (float("inf"), 2)
    assert EarlyStop.from_state(3, None) == EarlyStop(3)


def test_without_evaluations_it_is_refused():
    with pytest.raises(UserError, match="needs --eval_data and --eval_steps"):
        parse_arguments([*BASE, "--early_stop_patience", "2", "--eval_data", "e"])
    with pytest.raises(UserError, match="from 0 to 1"):
        parse_arguments([*BASE, "--lr_scheduler_type", "wsd", "--decay_ratio", "20"])
