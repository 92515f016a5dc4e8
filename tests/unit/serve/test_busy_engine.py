"""The window: how many requests are unfinished, in which order answers come back, what is asked of an engine."""

import itertools
import random

import pytest

from fft.serve.engines import Completion, Request
from fft.serve.sampling import Sampling, row_seed
from fft.serve.window import Question, answers


class Slow:
    """Finishes requests in any order, a few a step, and remembers how many it had."""

    name, limit, window = "slow", 100, 8

    def __init__(self, seed: int = 0) -> None:
        self.unfinished, self.most, self.fewest, self.random = {}, 0, [], random.Random(seed)

    def add(self, request: Request) -> None:
        assert request.number not in self.unfinished
        self.unfinished[request.number] = request
        self.most = max(self.most, len(self.unfinished))

    def step(self) -> list[tuple[int, Completion]]:
        self.fewest.append(len(self.unfinished))
        some = self.random.sample(sorted(self.unfinished), self.random.randint(0, min(3, len(self.unfinished))))
        done = [(number, self.unfinished.pop(number)) for number in some]
        return [(number, Completion(f"{request.ids} {request.seed}", request.room, "stop")) for number, request in done]

    def close(self) -> None:
        self.unfinished.clear()


def questions(count: int, sampling: Sampling, without: int = 0) -> list[Question]:
    return [Question(i, i, [i] if not without or i % without else None, sampling) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_answers_come_in_order_and_the_window_stays_full(seed):
    engine, sampling = Slow(seed), Sampling(7, temperature=1.0, n=2, seed=3)
    found = list(answers(engine, questions(60, sampling, without=7)))
    assert [question.item for question, _ in found] == list(range(60))
    for question, several in found:
        texts = [f"{question.ids} {row_seed(3, question.row, sample)}" for sample in (0, 1)]
        assert [one.text for one in several] == ([] if question.ids is None else texts)
    assert engine.most <= 9  # the window, and the second sample of the last question in it
    busy = engine.fewest[: -len(list(itertools.takewhile(lambda count: count < 8, reversed(engine.fewest))))]
    assert min(busy) >= 8


def test_questions_are_taken_as_they_are_needed():
    taken = []

    def endless():
        for question in itertools.cycle(questions(1, Sampling())):
            taken.append(1)
            yield question

    first = next(answers(Slow(), endless(), window=4))
    assert first[0].item == 0
    assert len(taken) < 40


def test_the_room_of_an_answer_ends_where_the_model_does():
    (found,) = answers(Slow(), [Question(0, 0, [1] * 97, Sampling(50))])
    assert found[1][0].tokens == 3


def test_no_questions_and_none_with_ids():
    assert list(answers(Slow(), [])) == []
    assert [several for _, several in answers(Slow(), questions(3, Sampling(), without=1))] == [(), (), ()]
