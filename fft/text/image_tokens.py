"""From one token an image, as the chat template writes it, to as many as it has; and the columns that images become."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists
from fft.errors import UserError
from fft.images.rules import GRIDS, ImageRules
from fft.text.chat_template import ChatTemplate
from fft.text.image_parts import ReadImage
from fft.text.records import Malformed

#: Private-use characters around an image that a template is asked to write.
_BEFORE, _AFTER = "\U000fff00", "\U000fff01"

Place = tuple[int, int]


@dataclass(frozen=True)
class Expanded:
    """Ids of chats, text ``i`` from ``offsets[i]``, in which every image has all of its tokens.

    ``moved[t]`` is where token ``t`` of the ids went that had one an image, and the last entry the end. Image ``j`` of
    chat ``i``, ``images[i][j]``, lies at tokens ``places[i][j]`` of it, those around it among them.
    """

    ids: np.ndarray
    offsets: np.ndarray
    moved: np.ndarray
    before: np.ndarray
    images: Sequence[Sequence[ReadImage]]
    places: list[list[Place]]

    def move(self, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token positions in each text, as they are now."""
        begins = zip(found, self.before.tolist(), self.offsets.tolist(), strict=False)
        return [(self.moved[a + old] - new, self.moved[b + old] - new) for (a, b), old, new in begins]

    def inside(self) -> np.ndarray:
        """Which tokens are an image's, or around one: bool."""
        steps = np.zeros(len(self.ids) + 1, np.int32)
        for offset, places in zip(self.offsets.tolist(), self.places, strict=False):
            for begin, end in places:
                steps[offset + begin] += 1
                steps[offset + end] -= 1
        return np.cumsum(steps[:-1]) > 0

    def columns(self, cuts: Sequence[Sequence[Place]]) -> tuple[list[pa.Array], Counter[str]]:
        """The columns ``image_grids`` and ``images`` of the rows into which each text is cut, and what is counted."""
        rows = [
            [image for image, (begin, end) in zip(own, places, strict=True) if start <= begin and end <= stop]
            for own, places, stretches in zip(self.images, self.places, cuts, strict=True)
            for start, stop in stretches
        ]
        given, kept = ([image for row in many for image in row] for many in (self.images, rows))
        counts = Counter(animations=sum(image.frames for image in kept), dropped_images=len(given) - len(kept))
        offsets = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
        grids = np.array([image.grid for image in kept], np.int32).reshape(-1)
        data = pa.array([image.data for image in kept], pa.binary())
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), data)
        return [int_lists(grids, offsets * 3), lists], counts


def expand(ids: np.ndarray, offsets: np.ndarray, images: Sequence[Sequence[ReadImage]], rules: ImageRules) -> Expanded:
    """``ids`` of texts that begin at ``offsets`` have one image token for each of their ``images``, in order.

    Raises :class:`UserError` where they have not: the tokenizer makes something else of what the template writes.
    """
    tokens = np.flatnonzero(ids == rules.image_token)
    counts = np.array([image.tokens for own in images for image in own], np.int64)
    if not np.array_equal(np.diff(tokens.searchsorted(offsets)), [len(own) for own in images]):
        raise UserError(
            f"`tokenizer`: the chat template writes {len(counts)} images, of which the tokenizer makes {len(tokens)} "
            f"tokens of the id {rules.image_token} that config.json names: give the whole directory of one model."
        )
    bare = rules.family in GRIDS  # there the template writes what is around an image
    repeats = np.ones(len(ids), np.int64)
    repeats[tokens] = counts + (0 if bare else 2)
    moved = np.append(0, np.cumsum(repeats))
    expanded, begins, ends = np.repeat(ids, repeats), moved[tokens], moved[tokens + 1]
    if bare:
        begins = begins - (np.append(ids, -1)[tokens - 1] == rules.start_token)
        ends = ends + (np.append(ids, -1)[tokens + 1] == rules.end_token)
    else:
        expanded[begins], expanded[ends - 1] = rules.start_token, rules.end_token
    at, pairs = moved[offsets], list(zip(begins.tolist(), ends.tolist(), strict=True))
    bounds = np.append(0, np.cumsum([len(own) for own in images], dtype=np.int64)).tolist()
    places = [
        [(begin - int(at[i]), end - int(at[i])) for begin, end in pairs[bounds[i] : bounds[i + 1]]]
        for i in range(len(images))
    ]
    return Expanded(expanded, at, moved, offsets, images, places)


def written_image(template: ChatTemplate, token: str, name: str) -> str:
    """What a chat template writes for an image between two texts of a content. Raises :class:`UserError` naming the
    tokenizer where it does not write it there."""
    texts = [{"type": "text", "text": mark} for mark in (_BEFORE, _AFTER)]
    content = [texts[0], {"type": "image"}, texts[1]]
    try:
        text = template.render([{"role": "user", "content": content}])
    except Malformed as error:
        raise UserError(f"`tokenizer` {name}: its chat template fails on a content with an image ({error}).") from error
    written = text[text.find(_BEFORE) + 1 : max(0, text.find(_AFTER))]
    if text.count(_BEFORE) != 1 or text.count(_AFTER) != 1 or text.count(token) != 1 or token not in written:
        raise UserError(
            f"`tokenizer` {name}: its chat template does not write a {token} where an image stands between two texts: "
            "put the chat_template.jinja of the model into the folder."
        )
    return written


def as_parts(messages: Sequence[dict], written: str) -> list[dict]:
    """Messages whose contents have ``written`` for images with lists of parts instead, as processors take them."""
    return [
        {**message, "content": _parts(message["content"].split(written))}
        if written in (message.get("content") or "")
        else message
        for message in messages
    ]


def _parts(texts: Sequence[str]) -> list[dict]:
    parts: list[dict] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
