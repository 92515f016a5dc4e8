"""A tokenizer's chat template: what it makes of a conversation, and which of its characters the model is to learn.

The rule. Of every assistant turn, these characters are trained on, and no others:

- the turn's content as far as the template renders it (Llama-3 trims it, Qwen3 drops the reasoning of earlier turns);
- what the template writes after it up to and including the end-of-turn token (``<|im_end|>``, ``<|eot_id|>``,
  ``</s>``, ...): the first special token that ends a turn in the middle of a conversation as well as at its end. The
  newline that some templates put after that token is not trained on. A template without such a token has none trained.
- Where the content brings reasoning (``<think>...</think>``, or a key ``reasoning_content``) and the template renders
  it, the tags around it as well: all from the end of the generation prompt.

Role headers, and an empty ``<think></think>`` that the template adds on its own, are not trained on.

How it is found. Templates are programs, so nothing is guessed from their text: the conversation is rendered as it is,
and once more with a mark around each assistant turn. Only if the second rendering without its marks is the first are
the marks believed. A mark that disturbs the template (it shields white space from a ``trim``) is tried further inside.
A turn for which no mark works is malformed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

from fft.errors import UserError
from spark_jobs.documents import Malformed

#: Private-use characters, of which a conversation uses two that it does not contain.
_MARKS = [chr(code) for code in range(0xFFF00, 0xFFFFE)]
_OPEN, _CLOSE = "<think>", "</think>"
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the rendered text: characters ``start`` to ``end`` are trained on, ``stop`` ends the turn.

    ``opens`` is true where another role, or nothing, follows: there a conversation may be cut.
    """

    start: int
    end: int
    stop: int
    opens: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its assistant turns in order."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """The template's source and what it was asked once.

    ``tail`` is what it writes after the content of the last turn, ``end_of_turn`` the part of it that is trained on,
    ``generation_prompt`` what it writes for the model to continue. ``date`` is what ``strftime_now`` tells all rows.
    """

    source: str
    special_tokens: tuple[tuple[str, object], ...]
    date: datetime
    tail: str = ""
    end_of_turn: str = ""
    generation_prompt: str = ""

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        """What ``tokenizer.apply_chat_template(messages, tokenize=False)`` gives. Raises :class:`Malformed`."""
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils as hugging_face

        try:
            return hugging_face._compile_jinja_template(self.source).render(
                messages=hugging_face._alias_reasoning_fields([dict(message) for message in messages]),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.date.strftime,
                **dict(self.special_tokens),
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise Malformed(f"the chat template refuses it: {error}") from error

    def locate(self, messages: Sequence[dict]) -> Rendered:
        """Render a conversation and find its assistant turns. Raises :class:`Malformed`."""
        text = self.render(messages)
        marks = list(islice((mark for mark in _MARKS if mark not in text), 2))
        if len(marks) < 2:
            raise Malformed("it uses all private-use characters of Unicode")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        contents = self._mark_all(messages, turns, text, *marks)
        if contents is None:
            contents = [self._mark_one(messages, i, text, marks[0]) for i in turns]
        found, begin = [], 0
        for i, (start, end, reasoning) in zip(turns, contents, strict=True):
            if not begin <= start <= end:
                raise Malformed(f"the chat template moves turn {i + 1}")
            if reasoning and self.generation_prompt:
                prompt = text.rfind(self.generation_prompt, begin, start)
                start = start if prompt < 0 else prompt + len(self.generation_prompt)
            begin = stop = end + _common(text[end : end + len(self.tail)], self.tail)
            end += len(self.end_of_turn) if text.startswith(self.end_of_turn, end) else 0
            opens = i + 1 == len(messages) or messages[i + 1]["role"] != "assistant"
            found.append(Turn(start, end, max(stop, end), opens))
        return Rendered(text, tuple(found))

    def _mark_all(
        self, messages: Sequence[dict], turns: Sequence[int], text: str, before: str, after: str
    ) -> list[tuple[int, int, bool]] | None:
        """(start, end, False) of the contents of all turns, by one rendering; None if the template minds the marks."""
        if any(isinstance(messages[i].get(key), str) for i in turns for key in _REASONING):
            return None
        marked = list(messages)
        for i in turns:
            marked[i] = {**messages[i], "content": f"{before}{messages[i]['content']}{after}"}
        try:
            between, *rest = self.render(marked).split(before)
        except Malformed:
            return None
        contents = [part.split(after) for part in rest]
        if len(rest) != len(turns) or any(len(part) != 2 for part in contents):
            return None
        found, parts = [], [between]
        at = len(between)
        for content, following in contents:
            found.append((at, at + len(content), False))
            at += len(content) + len(following)
            parts += content, following
        return found if "".join(parts) == text else None

    def _mark_one(self, messages: Sequence[dict], i: int, text: str, mark: str) -> tuple[int, int, bool]:
        """Start and end of what the template renders of turn ``i``, and whether that begins with reasoning."""
        start = self._first(messages, i, text, mark, _starts(messages[i]))
        end = self._first(messages, i, text, mark, _ends(messages[i]))
        if start is None or end is None:
            raise Malformed(f"turn {i + 1} (assistant) cannot be found in what the chat template makes of it")
        return start[0], end[0], start[1]

    def _first(
        self, messages: Sequence[dict], i: int, text: str, mark: str, places: Iterator[tuple[str, int, bool]]
    ) -> tuple[int, bool] | None:
        for key, place, reasoning in places:
            value = messages[i][key]
            marked = [*messages[:i], {**messages[i], key: value[:place] + mark + value[place:]}, *messages[i + 1 :]]
            try:
                rendered = self.render(marked)
            except Malformed:
                continue
            if rendered.count(mark) == 1 and rendered.replace(mark, "") == text:
                return rendered.index(mark), reasoning
        return None


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _common(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _starts(message: dict) -> Iterator[tuple[str, int, bool]]:
    """(key, position, whether reasoning) where a turn's rendered part may begin, outermost first."""
    for key in _REASONING:
        if isinstance(message.get(key), str):
            yield from ((key, at, True) for at in _after_space(message[key], 0))
    content = message["content"]
    yield from (("content", at, False) for at in _after_space(content, 0))
    close = content.find(_CLOSE)
    if close >= 0:
        opened = content.rfind(_OPEN, 0, close)
        begin = opened + len(_OPEN) if opened >= 0 else 0
        yield from (("content", min(at, close), True) for at in _after_space(content, begin))
        yield from (("content", at, False) for at in _after_space(content, content.rfind(_CLOSE) + len(_CLOSE)))


def _after_space(text: str, begin: int) -> list[int]:
    rest = text[begin:]
    return list(dict.fromkeys(len(text) - len(part) for part in (rest, rest.lstrip("\n"), rest.lstrip())))


def _ends(message: dict) -> Iterator[tuple[str, int, bool]]:
    content = message["content"]
    places = dict.fromkeys(len(part) for part in (content, content.rstrip("\n"), content.rstrip()))
    return (("content", at, False) for at in places)


def load_chat_template(tokenizer: object, name: str) -> ChatTemplate:
    """Ask a transformers tokenizer for its template, and the template what a turn ends with.

    Raises :class:`UserError` when there is none or it cannot render a question and an answer.
    """
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"--tokenizer {name} has no chat template: put chat_template.jinja of the chat model into the folder."
        ) from error
    date = datetime.now()  # naive, as transformers has it
    bare = ChatTemplate(source, tuple(tokenizer.special_tokens_map.items()), date)
    try:
        (turn,) = bare.locate(_PROBE).turns
        text = bare.render(_PROBE)
        question = bare.render(_PROBE[:1])
        asked = bare.render(_PROBE[:1], add_generation_prompt=True)
    except Malformed as error:
        raise UserError(
            f"--tokenizer {name}: its chat template fails on a plain question and answer ({error})."
        ) from error
    if "strftime_now" not in source and text != tokenizer.apply_chat_template(_PROBE, tokenize=False):
        raise UserError(f"--tokenizer {name}: its chat template is rendered in another way by its own class.")
    tail = text[turn.end :]
    return replace(
        bare,
        tail=tail,
        end_of_turn=_through_special_token(tail, tokenizer),
        generation_prompt=asked.removeprefix(question) if asked.startswith(question) else "",
    )


def _through_special_token(tail: str, tokenizer: object) -> str:
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    for tokens in (special, {str(token) for token in added}):
        ends = [(tail.find(token), -len(token)) for token in tokens if token and token in tail]
        if ends:
            at, size = min(ends)
            return tail[: at - size]
    return ""
