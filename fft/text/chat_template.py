"""A tokenizer's chat template: what it makes of a conversation, and which of its characters the model is to learn.

The rule. Of every assistant turn, these characters are trained on, and no others:

- the turn's content as far as the template renders it (Llama-3 trims it, Qwen3 drops the reasoning of earlier turns);
- what the template writes after it up to and including the end-of-turn token (``<|im_end|>``, ``<|eot_id|>``,
  ``</s>``, ...): the first special token that ends a turn in the middle of a conversation as well as at its end. The
  newline that some templates put after that token is not trained on. A template without such a token has none trained.
- Where the content brings reasoning (``<think>...</think>``, or a key ``reasoning_content``) and the template renders
  it, the tags around it as well: all from the end of the generation prompt.

Role headers, and an empty ``<think></think>`` that the template adds on its own, are not trained on; nor are turns that
say so themselves, and turns that the template leaves out, as some do with an empty one.

How it is found. Templates are programs, so nothing is guessed from their text. What a template writes between the
contents is learned once for each sequence of roles, from a rendering of marks. A conversation is rendered as it is, and
if that is exactly those parts with its contents between them, its turns are known. If not (a content is trimmed, its
reasoning dropped), it is rendered again with a mark at the turn's beginning, and believed only if that rendering
without the mark is the first. A mark that disturbs the template is tried further inside: past the white space, past
the reasoning. A turn for which no mark works is malformed.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from fft.errors import UserError
from fft.text.records import Malformed
from fft.text.template_limits import LONGEST, Deadline, fault_of
from fft.text.tool_calls import CALLS_KEY, MARKS, CallForm, call_form, check_rendered, find_calls, free_mark, in_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """A conversation as text, its assistant turns in order, and how many of them, and of users' and systems' turns,
    the template leaves out."""

    text: str
    turns: tuple[Turn, ...]
    left_out: int = 0
    unheard: int = 0


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
    source_with_tools: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """Words of the template: a key of a message that is none of them is not rendered."""
        return words_of(self.source, self.source_with_tools)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False, tools: Sequence[dict] = ()) -> str:
        """What ``tokenizer.apply_chat_template(messages, tools, tokenize=False)`` gives. Raises :class:`Malformed`."""
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils as hugging_face

        extra = any(len(message) > 2 for message in messages)
        try:
            source = self.source_with_tools if tools else self.source
            with Deadline(LONGEST):
                return hugging_face._compile_jinja_template(source).render(
                    messages=hugging_face._alias_reasoning_fields(list(messages)) if extra else messages,
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    strftime_now=self.date.strftime,
                    **dict(self.special_tokens),
                )
        except TimeoutError as error:
            raise Malformed(f"the chat template does not end within {LONGEST:.0f} s for it") from error
        except MemoryError as error:
            raise Malformed("the chat template takes more memory for it than there is") from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise Malformed(f"the chat template refuses it: {error}") from error

    def locate(self, messages: Sequence[dict], tools: Sequence[dict] = (), untrained: Collection[int] = ()) -> Rendered:
        """Render a conversation and find its assistant turns, of which those ``untrained`` are not trained on.

        Raises :class:`Malformed`, also for tools, their calls and roles that the template does not render.
        """
        if any(message.get(CALLS_KEY) for message in messages):
            messages = in_form(messages, _call_form(self))
        text = self.render(messages, tools=tools)
        if tools and text == self.render(messages):
            raise Malformed("it has tools, which the chat template does not render")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        contents, unheard = None if tools else self._between_frames(messages, turns, text), 0
        if contents is None:
            mark = free_mark(text)
            contents = [self._mark_one(messages, i, text, mark, tools) for i in turns]
            unheard = check_rendered(partial(self.render, tools=tools), messages, text, mark)
        found, begin = [], 0
        for i, content in zip(turns, contents, strict=True):
            opens = i + 1 == len(messages) or messages[i + 1]["role"] != "assistant"
            if content is None:
                found.append(Turn(begin, begin, begin, opens))
                continue
            start, end, reasoning = content
            if not begin <= start <= end:
                raise Malformed(f"the chat template moves turn {i + 1}")
            if reasoning and self.generation_prompt:
                prompt = text.rfind(self.generation_prompt, begin, start)
                start = start if prompt < 0 else prompt + len(self.generation_prompt)
            begin = stop = end + _common(text[end : end + len(self.tail)], self.tail)
            end += len(self.end_of_turn) if text.startswith(self.end_of_turn, end) else 0
            found.append(Turn(start, start if i in untrained else end, max(stop, end), opens))
        return Rendered(text, tuple(found), sum(content is None for content in contents), unheard)

    def _between_frames(
        self, messages: Sequence[dict], turns: Sequence[int], text: str
    ) -> list[tuple[int, int, bool]] | None:
        """(start, end, False) of the turns' contents if the template writes all as they are, or all trimmed."""
        if any(len(message) != 2 or "content" not in message for message in messages):  # not role and content alone
            return None
        frames = _frames(self, tuple(message["role"] for message in messages))
        if frames is None:
            return None
        contents = [message["content"] for message in messages]
        if not all(isinstance(content, str) for content in contents):  # lists of parts
            return None
        for written in (contents, [content.strip() for content in contents]):
            if "".join(chain(frames[:1], *zip(written, frames[1:], strict=True))) == text:
                sizes = [len(stretch) for pair in zip(frames, written, strict=False) for stretch in pair]
                ends = list(accumulate(sizes))[1::2]
                return [(ends[i] - len(written[i]), ends[i], False) for i in turns]
        return None

    def _mark_one(
        self, messages: Sequence[dict], i: int, text: str, mark: str, tools: Sequence[dict]
    ) -> tuple[int, int, bool] | None:
        """Start and end of what the template renders of turn ``i``, and whether that begins with reasoning.

        None if it renders nothing of it: no mark in it comes out, or it is empty and a mark in it changes the rest.
        """
        if messages[i].get(CALLS_KEY):
            begin, stop = find_calls(partial(self.render, tools=tools), messages, i, text, mark)
            return begin, stop, _CLOSE in messages[i].get("content", "") or any(map(messages[i].get, _REASONING))
        start, silent = self._first(messages, i, text, mark, _starts(messages[i]), tools)
        end, _ = self._first(messages, i, text, mark, _ends(messages[i]), tools)
        if start is not None and end is not None:
            return start[0], end[0], start[1]
        empty = not messages[i]["content"].strip() and not any(messages[i].get(key) for key in _REASONING)
        if silent or empty:
            return None
        raise Malformed(f"turn {i + 1} (assistant) cannot be found in what the chat template makes of it")

    def _first(
        self,
        messages: Sequence[dict],
        i: int,
        text: str,
        mark: str,
        positions: Iterator[tuple[str, int, bool]],
        tools: Sequence[dict],
    ) -> tuple[tuple[int, bool] | None, bool]:
        """Where the first mark that disturbs nothing is, and whether it is in reasoning; and whether all marks tried
        changed nothing at all."""
        silent = True
        for key, at, reasoning in positions:
            value = messages[i][key]
            marked = [
                *messages[:i],
                {**messages[i], key: value[:at] + mark + value[at:]},
                *messages[i + 1 :],
            ]
            try:
                rendered = self.render(marked, tools=tools)
            except Malformed:
                silent = False
                continue
            if rendered.count(mark) == 1 and rendered.replace(mark, "") == text:
                return (rendered.index(mark), reasoning), False
            silent = silent and rendered == text
        return None, silent


_REASONING = ("reasoning_content", "thinking", "reasoning")


@lru_cache(maxsize=4096)
def _frames(template: ChatTemplate, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """What the template writes before, between and after contents of these roles; None if it moves or drops them."""
    if len(roles) > len(MARKS):
        return None
    marks = MARKS[: len(roles)]
    try:
        text = template.render([{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)])
    except Malformed:
        return None
    frames = re.split(f"[{marks[0]}-{marks[-1]}]", text)
    whole = "".join(x for pair in zip(frames, marks, strict=False) for x in pair) + frames[-1]
    return tuple(frames) if len(frames) == len(roles) + 1 and whole == text else None


@lru_cache(maxsize=2)
def _call_form(template: ChatTemplate) -> CallForm | None:
    return call_form(template.render)


@lru_cache(maxsize=2)
def words_of(*sources: str) -> frozenset[str]:
    """The words of a template's source: a key of a message that is none of them is not rendered."""
    words = frozenset(word for source in sources for word in re.findall(r"\w+", source))
    # transformers fills each of the keys of reasoning from the others
    return words.union(_REASONING) if words.intersection(_REASONING) else words


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
    return list(dict.fromkeys(len(text) - len(stretch) for stretch in (rest, rest.lstrip("\n"), rest.lstrip())))


def _ends(message: dict) -> Iterator[tuple[str, int, bool]]:
    content = message["content"]
    positions = dict.fromkeys(len(stretch) for stretch in (content, content.rstrip("\n"), content.rstrip()))
    return (("content", at, False) for at in positions)


def load_chat_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> ChatTemplate:
    """Ask a transformers tokenizer for its template, and the template what a turn ends with.

    Raises :class:`UserError` when there is none or it cannot render a question and an answer in a short time.
    """
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"`tokenizer` {name} has no chat template: put chat_template.jinja of the chat model into the folder."
        ) from error
    date = datetime.now()  # naive, as transformers has it
    with_tools = tokenizer.get_chat_template(tools=[{}])
    special_tokens = tuple(tokenizer.special_tokens_map.items())
    bare = ChatTemplate(source, special_tokens, date, source_with_tools=with_tools)
    if fault := fault_of(lambda: [bare.locate(_PROBE), bare.render(_PROBE[:1], True), bare.render(_PROBE, tools=[{}])]):
        raise UserError(
            f"`tokenizer` {name}: its chat template {fault} for a plain question and answer: read what it does, and do "
            "not use it."
        )
    try:
        (turn,) = bare.locate(_PROBE).turns
        text = bare.render(_PROBE)
        question = bare.render(_PROBE[:1])
        asked = bare.render(_PROBE[:1], add_generation_prompt=True)
    except Malformed as error:
        raise UserError(
            f"`tokenizer` {name}: its chat template fails on a plain question and answer ({error})."
        ) from error
    if "strftime_now" not in source and text != tokenizer.apply_chat_template(_PROBE, tokenize=False):
        raise UserError(f"`tokenizer` {name}: its chat template is rendered in another way by its own class.")
    tail = text[turn.end :]
    return replace(
        bare,
        tail=tail,
        end_of_turn=_through_special_token(tail, tokenizer),
        generation_prompt=asked.removeprefix(question) if asked.startswith(question) else "",
    )


def _through_special_token(tail: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    for tokens in (special, {str(token) for token in added}):
        ends = [(tail.find(token), -len(token)) for token in tokens if token and token in tail]
        if ends:
            at, size = min(ends)
            return tail[: at - size]
    return ""
