"""Keep an engine busy: so many requests unfinished at any time, answers in the order of the questions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fft.serve.engines import Completion, Engine, Request
from fft.serve.sampling import Sampling, row_seed
from fft.text.image_parts import ReadImage

#: Whatever travels along with a question.
T = TypeVar("T")
#: Questions that wait for an earlier one's answer, at most: what they hold is in memory, and lost by a crash.
_MOST_WAITING = 20_000


@dataclass(frozen=True)
class Question(Generic[T]):
    """A prompt's ids, of which ``sampling.n`` answers are wanted; ``row`` names it for :func:`row_seed`.

    ``images`` are those whose tokens are among the ids. Without ids there is nothing to ask: it comes back, in its
    place, without answers. ``item`` travels along.
    """

    item: T
    row: int | str
    ids: Sequence[int] | None
    sampling: Sampling
    images: Sequence[ReadImage] = ()


def answers(
    engine: Engine, questions: Iterable[Question[T]], window: int | None = None
) -> Iterator[tuple[Question[T], tuple[Completion, ...]]]:
    """Ask an engine; every question comes back with its ``n`` answers, in the order in which they were given.

    Questions are taken as needed, so there may be any number of them. ``window`` requests are unfinished as long as
    there are as many; by default the engine's own.
    """
    window = window or engine.window
    source, number = iter(questions), 0
    #: Of every question that has not come back: its requests' numbers. Of every finished request: its answer.
    asked: dict[int, tuple[Question[T], range]] = {}
    done: dict[int, Completion] = {}
    first = last = unfinished = 0
    more = True
    while more or asked:
        while more and unfinished < window and len(asked) < _MOST_WAITING:
            question = next(source, None)
            if question is None:
                more = False
                break
            requests = _requests(question, number, engine.limit)
            for request in requests:
                engine.add(request)
            asked[last] = question, range(number, number + len(requests))
            number, last, unfinished = number + len(requests), last + 1, unfinished + len(requests)
        if unfinished:
            finished = engine.step()
            done.update(finished)
            unfinished -= len(finished)
        while first in asked and all(wanted in done for wanted in asked[first][1]):
            question, numbers = asked.pop(first)
            first += 1
            yield question, tuple(done.pop(wanted) for wanted in numbers)


def _requests(question: Question[T], number: int, limit: int) -> list[Request]:
    """The requests of a question, one a sample, numbered from ``number``."""
    if question.ids is None:
        return []
    sampling = question.sampling
    room = min(sampling.max_new_tokens, limit - len(question.ids))
    return [
        Request(number + k, question.ids, sampling, row_seed(sampling.seed, question.row, k), room, question.images)
        for k in range(sampling.n)
    ]
