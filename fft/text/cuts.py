"""Where a long chat is cut. Pure functions of token positions.

The rule, for a conversation longer than ``max_len`` tokens:

- It is cut where an assistant turn ends and another role's turn begins, as late as ``max_len`` allows: every row
  begins with a user's or system's turn (only the first has the system prompt) and ends with an assistant's.
- A round of turns that alone is longer than ``max_len`` is cut between consecutive assistant turns, too. If what is
  left is still longer, it keeps the whole trained turn and as many tokens before it as fit; the rest is dropped.
- Only a trained turn that alone is longer than ``max_len`` is cut inside: then what is left, from its beginning, is
  cut every ``max_len`` tokens.
- No cut falls inside of an image: one of the last two rules is made where the image ends, or begins, so that a row has
  an image whole or not at all.
- Stretches on which nothing would be trained are dropped, among them a last question without an answer if it does not
  fit into the last row. How many tokens were dropped is counted.
"""

from collections.abc import Sequence


def cut_chat(
    length: int,
    turns: Sequence[tuple[int, int, int, bool]],
    max_len: int | None,
    images: Sequence[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """Token stretches [begin, end) of at most ``max_len`` tokens that a conversation of ``length`` tokens becomes.

    ``turns`` are its assistant turns in order: (first and one past the last trained token, where the next turn begins,
    whether that is of another role). ``images`` are where images lie [begin, end), none longer than ``max_len``.
    """
    if max_len is None or length <= max_len:
        return [(0, length)]
    rows: list[tuple[int, int]] = []
    for turns_of_round in _rounds(length, turns):
        begin, end, trained = turns_of_round[0][0], turns_of_round[-1][1], [t for _, _, t in turns_of_round if t]
        if rows and end - rows[-1][0] <= max_len and rows[-1][1] == begin:
            rows[-1] = (rows[-1][0], end)
        elif not trained:
            continue
        elif end - begin <= max_len:
            rows.append((begin, end))
        else:
            for begin, end, turn in turns_of_round:
                rows += _long(begin, end, turn, max_len, images)
    return rows


def first_row(length: int, max_len: int | None, images: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
    """The stretch that is kept of a conversation on which nothing is trained: its beginning."""
    return 0, _before_image(min(length, max_len or length), images)


def _before_image(at: int, images: Sequence[tuple[int, int]]) -> int:
    """A cut at this token, or where the image begins in which it would lie."""
    return next((begin for begin, end in images if begin < at < end), at)


def _rounds(
    length: int, turns: Sequence[tuple[int, int, int, bool]]
) -> list[list[tuple[int, int, tuple[int, int] | None]]]:
    """Rounds that end where another role begins; each a list of stretches with one trained turn at most."""
    rounds, turns_of_round, begin = [], [], 0
    for first, last, stop, opens in turns:
        turns_of_round.append((begin, stop, (first, last) if first < last else None))
        begin = stop
        if opens:
            rounds.append(turns_of_round)
            turns_of_round = []
    if begin < length:
        turns_of_round.append((begin, length, None))
    return [*rounds, turns_of_round] if turns_of_round else rounds


def _long(
    begin: int, end: int, turn: tuple[int, int] | None, max_len: int, images: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    if turn is None:
        return []
    if end - begin <= max_len:
        return [(begin, end)]
    first, last = turn
    if last - first <= max_len:
        end = end if end - first <= max_len else last
        at = max(begin, end - max_len)
        return [(next((stop for start, stop in images if start < at < stop), at), end)]
    rows, at = [], begin
    while at < end:
        stop = _before_image(min(at + max_len, end), images)
        rows.append((at, stop))
        at = stop
    return [(a, b) for a, b in rows if a < last and b > first]
