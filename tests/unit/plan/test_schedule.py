"""Pipelines played through: orders are DeepSpeed's and Megatron's, times those that formulas say where they say any."""

import itertools

import pytest

from fft.plan.schedule import BACKWARD, FORWARD, RECEIVE, SEND, deepspeed_orders, play_blocking, play_eager


@pytest.mark.parametrize(("stages", "micros"), [(1, 3), (2, 1), (2, 5), (4, 4), (5, 9)])
def test_orders_are_those_of_deepspeed(stages, micros):
    schedule = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    kinds = {"ForwardPass": FORWARD, "BackwardPass": BACKWARD, "SendActivation": SEND, "SendGrad": SEND}
    kinds |= {"RecvActivation": RECEIVE, "RecvGrad": RECEIVE}
    for stage, own in enumerate(deepspeed_orders(stages, micros)):
        steps = schedule.TrainSchedule(micros, stages, stage)
        names = [type(command).__name__ for step in steps for command in step]
        assert [task.kind for task in own] == [kinds[name] for name in names if name in kinds]
        back = [name.endswith("Grad") for name in names if kinds.get(name) in (SEND, RECEIVE)]
        assert [task.back for task in own if task.kind in (SEND, RECEIVE)] == back


@pytest.mark.parametrize(("stages", "micros"), [(1, 4), (2, 2), (4, 8), (8, 8), (3, 10)])
def test_equal_stages_wait_as_the_formula_says(stages, micros):
    blocking = play_blocking([1.0] * stages, [2.0] * stages, [0.0] * (stages - 1), micros)
    eager = play_eager([[1.0]] * stages, [[2.0]] * stages, [0.0] * stages, micros)
    assert blocking.seconds == eager.seconds == 3.0 * (micros + stages - 1)


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_wait(chunks):
    stages, micros = 4, 8
    part = [1.0 / chunks] * chunks, [2.0 / chunks] * chunks
    played = play_eager([part[0]] * stages, [part[1]] * stages, [0.0] * stages, micros)
    assert played.seconds == pytest.approx(3.0 * (micros + (stages - 1) / chunks))


def test_a_message_holds_both_ranks():
    played = play_blocking([1.0, 1.0], [2.0, 2.0], [0.5], 1)
    assert played.seconds == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert [[task.kind for task, _, _ in rank] for rank in played.spans] == [
        [FORWARD, SEND, RECEIVE, BACKWARD],
        [RECEIVE, FORWARD, BACKWARD, SEND],
    ]


def test_nothing_happens_twice_at_once():
    played = play_blocking([1.0, 3.0, 2.0], [2.0, 5.0, 4.0], [0.5, 0.25], 7)
    for rank in played.spans:
        assert len([task for task, _, _ in rank if task.kind == FORWARD]) == 7
        assert all(end <= begin for (_, _, end), (_, begin, _) in itertools.pairwise(rank))
    assert played.seconds >= 7 * 8 + 2 + 1 + 2


def test_messages_that_are_paired_go_at_the_same_time():
    alone, together = (play_blocking([1.0, 1.0], [2.0, 2.0], [0.5], 4, paired) for paired in (False, True))
    # Of four messages each way, the first there and the last back have no other beside them.
    assert alone.seconds == 3.0 * 5 + 8 * 0.5
    assert together.seconds == 3.0 * 5 + 5 * 0.5
    assert [[task for task, _, _ in rank] for rank in together.spans] == [
        [task for task, _, _ in rank] for rank in alone.spans
    ]
    longer = [play_blocking([1.0, 3.0, 2.0], [2.0, 5.0, 4.0], [0.5, 0.25], 7, paired).seconds for paired in (0, 1)]
    assert 7 * 8 < longer[1] < longer[0]
