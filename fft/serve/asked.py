"""What a record asks: its prompt, the fields that travel along to its answer, and how tokens are chosen for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fft.serve.openai_batch import is_request, read_request
from fft.serve.sampling import Sampling
from fft.text.formats import PROMPTS, TURN_KEYS
from fft.text.image_parts import IMAGE_KEYS
from fft.text.records import Malformed

#: Keys of an output row that a record may not bring itself; the last two where they are written at all.
PROMPT, TEXT, FINISH, LOGPROBS, ERROR = "prompt", "text", "finish_reason", "logprobs", "error"


@dataclass(frozen=True)
class Asked:
    """A ``prompt`` for :class:`fft.serve.prompts.Renderer`, and what of its record the output shows before the answer
    (``lead``) and after it (``fields``). ``request`` is that of an OpenAI batch file, answered in its form."""

    prompt: Any
    lead: Mapping[str, Any]
    fields: Mapping[str, Any]
    sampling: Sampling
    request: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reading:
    """How records are read: under which key the prompt stands, the sampling, names that the output has for itself, and
    whether there may be images beside a prompt."""

    key: str
    sampling: Sampling
    reserved: tuple[str, ...] = field(default=(TEXT, FINISH))
    images: bool = False

    def ask(self, value: Any) -> Asked:
        """What a record asks.

        A text, a list of turns, an object with either under the key, one of the formats of conversations, or a
        request of an OpenAI batch file. Raises :class:`Malformed`.
        """
        if isinstance(value, Malformed):
            raise value
        if isinstance(value, str):
            return Asked(value, {PROMPT: value}, {}, self.sampling)
        if isinstance(value, list):
            return Asked(value, {TURN_KEYS[0]: value}, {}, self.sampling)
        if not isinstance(value, dict):
            raise Malformed(f"not a JSON object but {type(value).__name__}")
        if is_request(value):
            prompt, sampling = read_request(value, self.sampling)
            return Asked(prompt, {}, {}, sampling, value)
        if self.key not in value:
            if any(value.get(form.keys[0]) is not None for form in PROMPTS):
                self._check_fields(value)
                return Asked(value, {}, value, self.sampling)
            raise Malformed(
                f"it has no {self.key!r} (but {', '.join(map(str, value)) or 'nothing'}): name it with --prompt_key"
            )
        prompt = value[self.key]
        if not isinstance(prompt, (str, list)):
            raise Malformed(f"{self.key!r} must be a text or a list of turns, not {type(prompt).__name__}")
        fields = {name: own for name, own in value.items() if name != self.key}
        self._check_fields(fields, PROMPT)
        asked = with_images(prompt, value) if self.images else prompt
        return Asked(asked, {PROMPT: prompt}, fields, self.sampling)

    def _check_fields(self, fields: Mapping[str, Any], *more: str) -> None:
        for name in (*self.reserved, *more):
            if name in fields:
                raise Malformed(f"it has a field {name!r}, which the output needs for itself: rename it")


def with_images(prompt: Any, record: Mapping[str, Any]) -> Any:
    """A prompt of a record, a text or turns; with the images beside it, where there are any, as a conversation."""
    beside = {key: record[key] for key in IMAGE_KEYS if record.get(key) is not None}
    if not beside:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {TURN_KEYS[0]: turns, **beside}
