"""From what a record asks to token ids: texts, and conversations by the tokenizer's own template, with their images.

One renderer for the command line, Spark's workers and whoever else generates. Turns are read by
:mod:`fft.text.messages`, as those to train on are: what is refused there by name is refused here, too. Lengths are
checked here, before any engine, so that every engine takes and refuses the same.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fft.errors import UserError, one_line
from fft.serve.prompt_flags import CHAT
from fft.text.chat_template import words_of
from fft.text.convert_tokenizer import check_converted
from fft.text.encoder import read_tokenizer
from fft.text.formats import PROMPTS
from fft.text.image_parts import ImageParts, ReadImage
from fft.text.image_tokens import as_parts, expand
from fft.text.messages import RawConversation, check_unicode, read_conversation
from fft.text.records import Malformed
from fft.text.tool_calls import CALLS_KEY, OF_TOOLS, CallForm, call_form, check_calls_and_roles, in_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(list[int]):
    """The ids of a prompt. All tokens of its ``images`` are among them, in their order."""

    def __init__(self, ids: Iterable[int], images: Sequence[ReadImage] = ()) -> None:
        super().__init__(ids)
        self.images = images


@dataclass(frozen=True)
class _Written:
    """What to tokenize; whether special tokens are put around it, as templates do themselves; the images in it."""

    text: str
    special: bool
    images: tuple[ReadImage, ...] = ()


@dataclass
class Renderer:
    """Renders prompts for one model: a text (a string), a list of turns, or an object with turns and tools.

    ``limit`` are tokens of a prompt and its answer. With ``chat``, a text is one user's turn; ``system`` is put before
    turns that do not begin with one of their own. With ``images``, turns may hold some, or they stand beside these.
    Keys of turns that the template does not read are counted in ``unused``; what else stands in an object is its
    owner's.
    """

    tokenizer: "PreTrainedTokenizerBase"
    limit: int
    chat: bool
    system: str | None = None
    images: ImageParts | None = None
    unused: Counter[str] = field(default_factory=Counter)
    _keys: frozenset[str] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template:
            sources = [self.tokenizer.get_chat_template(), self.tokenizer.get_chat_template(tools=[{}])]
            self._keys = words_of(*sources)

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        limit: int,
        chat: str = "auto",
        system: str | None = None,
        images: ImageParts | None = None,
    ) -> "Renderer":
        """One for a tokenizer of :func:`load_model_tokenizer`. Raises :class:`UserError` for chats without template."""
        if chat not in CHAT:
            raise UserError(f"`chat` {chat} must be one of {', '.join(CHAT)}.")
        has_template = bool(tokenizer.chat_template)
        if not has_template and (chat == "yes" or system is not None):
            asked = '`chat="yes"`' if chat == "yes" else "`system`"
            raise UserError(
                f"{asked}: {tokenizer.name_or_path} has no chat template: put chat_template.jinja of the chat model "
                "into the folder."
            )
        if chat == "no" and system is not None:
            raise UserError('`system` is a turn of a chat: leave it out, or give `chat="yes"`.')
        return cls(tokenizer, limit, has_template and chat != "no", system, images)

    def render(self, prompt: object) -> Prompt:
        """The ids of one prompt. Raises :class:`Malformed`: no prompt, or one that is empty or too long."""
        (found,) = self.render_many([prompt])
        if isinstance(found, Malformed):
            raise found
        return found

    def render_many(self, prompts: Sequence[object]) -> list[Prompt | Malformed]:
        """The ids of each prompt, or why it has none; many at a time are tokenized faster.

        Raises :class:`UserError` for a tokenizer that makes of images what the model does not take for some.
        """
        written: list[_Written | Malformed] = []
        for prompt in prompts:
            try:
                written.append(self._write(prompt))
            except Malformed as error:
                written.append(error)
        ids: dict[int, list[int]] = {}
        for special in (True, False):
            mine = {
                at: one.text for at, one in enumerate(written) if isinstance(one, _Written) and one.special is special
            }
            if mine:
                found = self.tokenizer([*mine.values()], add_special_tokens=special, verbose=False).input_ids
                ids |= zip(mine, found, strict=True)
        return [one if isinstance(one, Malformed) else self._checked(ids[at], one) for at, one in enumerate(written)]

    def _write(self, prompt: object) -> _Written:
        if isinstance(prompt, str):
            check_unicode(prompt)
            if not self.chat:
                if self.images is not None:
                    self.images.check_written(prompt, [prompt], 0)
                return _Written(prompt, True)
            if not prompt:
                raise Malformed("the prompt is empty")
            prompt = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, (list, dict)):
            raise Malformed(f"the prompt is {type(prompt).__name__}, it must be a text or a list of turns")
        if self._keys is None:
            raise Malformed("the prompt is a conversation, for which the model has no chat template")
        return self._conversation(prompt)

    def conversation(self, prompt: str | list | dict, unused: Counter[str] | None = None) -> RawConversation:
        """The turns that a prompt stands for: a text is a user's. Keys that are not read are counted in ``unused``.

        Raises :class:`Malformed`.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        raw = read_conversation(prompt, self._keys or (), unused, prompt, self.images, PROMPTS)
        if self.system is None or not raw.messages or raw.messages[0]["role"] in ("system", "developer"):
            return raw
        messages = [{"role": "system", "content": self.system}, *raw.messages]
        return replace(raw, messages=messages, untrained=frozenset(number + 1 for number in raw.untrained))

    def _conversation(self, prompt: list | dict) -> _Written:
        raw = self.conversation(prompt, self.unused)
        if not raw.messages:
            raise Malformed("the conversation has no turns")
        check_unicode([raw.messages, raw.tools])
        messages, images = raw.messages, ()
        if self.images is not None and raw.images:
            images = tuple(self.images.read(source, number) for number, source in enumerate(raw.images, 1))
            messages = as_parts(messages, self.images.written)
        if any(message.get(CALLS_KEY) for message in messages):
            messages = in_form(messages, self._call_form)
        text = self._apply(messages, raw.tools)
        if raw.tools and text == self._apply(messages, ()):
            raise Malformed("it has tools, which the chat template does not render")
        if any(message["role"] in OF_TOOLS or message.get(CALLS_KEY) for message in messages):
            check_calls_and_roles(lambda turns: self._rendered(turns, raw.tools, False), messages)
        if self.images is not None:
            self.images.check_written(text, [m["content"] or "" for m in raw.messages], len(images))
        return _Written(text, False, images)

    @cached_property
    def _call_form(self) -> CallForm | None:
        return call_form(lambda messages: self._rendered(messages, (), False))

    def _apply(self, messages: list[dict], tools: Sequence[dict]) -> str:
        """The template's text, with what it writes for the model to answer; an assistant's last turn goes on."""
        return self._rendered(messages, tools, messages[-1]["role"] == "assistant", messages[-1]["role"] != "assistant")

    def _rendered(self, messages: Sequence[dict], tools: Sequence[dict], goes_on: bool, asks: bool = False) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=asks,
                continue_final_message=goes_on,
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise Malformed(f"the chat template refuses it: {one_line(error)}") from error
        return str(text)

    def _checked(self, ids: list[int], written: _Written) -> Prompt | Malformed:
        if not ids:
            return Malformed("the prompt is empty: it has no tokens")
        if self.images is not None and written.images:
            expanded = expand(np.array(ids), np.array([0, len(ids)]), [written.images], self.images.rules)
            ids = expanded.ids.tolist()
        if len(ids) >= self.limit:
            return Malformed(
                f"the prompt has {len(ids):,} tokens, but may have {self.limit - 1:,}: the model takes {self.limit:,}, "
                "one of them for the answer"
            )
        return Prompt(ids, written.images)


def load_model_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model directory. Raises :class:`UserError` when there is none that can be loaded."""
    check_converted(Path(model), "--model")
    try:
        if not Path(model).is_dir():
            raise OSError("no such folder")
        return read_tokenizer(model, padding_side="left")
    except Exception as error:  # the library behind it raises Exception itself
        raise UserError(
            f"--model {model} has no tokenizer that can be loaded ({one_line(error)[:120]}): copy tokenizer.json and "
            "tokenizer_config.json there."
        ) from error
