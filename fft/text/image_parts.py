"""Images in conversations as data sets write them: found in the turns, put there as the template writes them, and read.

The forms, of which docs/inputs.md tells: a content that is a list ``[text, file, ...]``, as ``jllm`` has it; a content
that is a list of parts, as OpenAI has it; and images beside the turns. A ``<image>`` in a text stands for one.
"""

import base64
import binascii
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fft.images.grids import Grid, ImageError, grid_of, tokens_of
from fft.images.pixels import check_image
from fft.images.rules import ImageRules
from fft.text.records import Malformed, count_unused

#: Keys (columns) beside the turns that hold images: a list, or one.
IMAGE_KEYS = ("images", "image")
MARK = "<image>"
#: Keys of a part that may hold an image, or say where it lies.
_SOURCES = ("image_url", "image", "url", "path", "base64", "bytes")
#: Of these, keys of bytes in base64.
_IN_BASE64 = ("base64", "bytes")
#: Types of parts that are images.
IMAGE_KINDS = ("image", "image_url")
#: Of a part's settings, those that would change what is seen of an image.
_REFUSED = ("min_pixels", "max_pixels", "resized_height", "resized_width")

#: Tokens around those of an image.
_AROUND = 2

#: Characters of a file's name that are told.
_LONGEST_NAME = 120

#: What is said of an image: its bytes, or the name of its file.
Source = bytes | str


@dataclass(frozen=True)
class ReadImage:
    """An image's bytes as they came, its grid and tokens (without those around it); ``frames`` of an animation."""

    data: bytes
    grid: Grid
    tokens: int
    frames: bool


@dataclass(frozen=True)
class ImageParts:
    """Reads images of conversations. ``folder`` is where their files lie, ``written`` what the chat template writes for
    one, in which ``token`` is the string of the image token; a row has at most ``max_len`` tokens."""

    rules: ImageRules
    folder: str
    written: str
    token: str
    max_len: int | None = None

    def beside(self, row: Mapping[str, object]) -> list[Source] | None:
        """The images beside the turns; None where there are none. Raises :class:`Malformed`."""
        found = [key for key in IMAGE_KEYS if row.get(key) is not None]
        if len(found) > 1:
            raise Malformed(f"both {' and '.join(found)} are there")
        if not found:
            return None
        value = row[found[0]]
        values = value if isinstance(value, list) else [value]
        return [_source(one, f"image {number} beside the turns") for number, one in enumerate(values, 1)]

    def content(
        self, content: object, where: str, waiting: list[Source] | None, unused: Counter[str] | None
    ) -> tuple[str, list[Source]]:
        """A turn's content as text, with what the template writes in the place of each image; and these images.

        Those beside the turns that are still ``waiting`` are taken from there. Raises :class:`Malformed`.
        """
        if isinstance(content, str):
            return self._marked(content, where, waiting) if waiting is not None else (content, [])
        if not isinstance(content, list):
            raise Malformed(f"the content of {where} is {type(content).__name__}, neither a string nor a list")
        if not any(isinstance(part, dict) for part in content):
            return self._text_and_files(content, where)
        texts, sources = [], []
        for number, part in enumerate(content, 1):
            text, source = self._part(part, f"part {number} of {where}", waiting, unused)
            texts.append(text)
            sources += source
        return "".join(texts), sources

    def read(self, source: Source, number: int) -> ReadImage:
        """An image of a conversation, checked to its last byte. Raises :class:`Malformed` naming it."""
        name = f"image {number}" + (f" ({_shown(source)})" if isinstance(source, str) else "")
        try:
            data = self._read_file(source) if isinstance(source, str) else source
            seen = check_image(data)
            grid = grid_of(self.rules, seen.width, seen.height)
        except (OSError, UnicodeEncodeError) as error:
            raise Malformed(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        except ImageError as error:
            raise Malformed(f"{name} {error}") from error
        tokens = tokens_of(self.rules, grid)
        if self.max_len is not None and tokens + _AROUND > self.max_len:
            raise Malformed(f"{name} has {tokens} tokens and {_AROUND} around them, more than max_len {self.max_len}")
        return ReadImage(data, grid, tokens, seen.frames)

    def check_written(self, text: str, contents: Sequence[str], count: int) -> None:
        """Raise :class:`Malformed` where the ``text`` that a template makes of ``contents`` does not have their
        ``count`` images, and only these."""
        if text.count(self.token) == count:
            return
        if sum(content.count(self.token) for content in contents) == count:
            raise Malformed("the chat template leaves out some of its images")
        raise Malformed(f"a text holds {self.token}, which stands for an image")

    def marked(self, content: str) -> str:
        """A content as :meth:`content` gives it, with marks in the place of images, as it is read from there again."""
        return content.replace(self.written, f"{MARK}\n" if self.written.endswith("\n") else MARK)

    def _text_and_files(self, content: Sequence[object], where: str) -> tuple[str, list[Source]]:
        wrong = next((part for part in content if not isinstance(part, str)), None)
        if wrong is not None or not content:
            found = "nothing" if wrong is None else f"{type(wrong).__name__}, no string"
            raise Malformed(f"the list of {where} holds {found}: it must be a text and files, or parts")
        files = [_source(file, f"image {number} of {where}") for number, file in enumerate(content[1:], 1)]
        text, sources = self._marked(str(content[0]), where, files)
        if files:
            raise Malformed(f"{where} has {len(sources)} {MARK} and {len(sources) + len(files)} images")
        return text, sources

    def _marked(self, text: str, where: str, waiting: list[Source]) -> tuple[str, list[Source]]:
        """A text with the next of the ``waiting`` images for each mark."""
        count = text.count(MARK)
        if count > len(waiting):
            raise Malformed(f"{where} has {count} {MARK}, for which {len(waiting)} images are left")
        sources = [waiting.pop(0) for _ in range(count)]
        if self.written.endswith("\n"):  # a line end that follows the mark is the one that the template writes
            text = text.replace(MARK + "\n", MARK)
        return text.replace(MARK, self.written), sources

    def _part(
        self, part: object, where: str, waiting: list[Source] | None, unused: Counter[str] | None
    ) -> tuple[str, list[Source]]:
        if isinstance(part, str):
            return part, []
        if not isinstance(part, dict):
            raise Malformed(f"{where} is {type(part).__name__}, not an object")
        kind = part.get("type", next((key for key in ("text", *IMAGE_KINDS) if key in part), None))
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise Malformed(f"{where} is of type text and has none")
            count_unused(part, ("type", "text"), unused, "of a part")
            return part["text"], []
        if kind not in IMAGE_KINDS:
            raise Malformed(f"{where} is of type {kind!r}: only text, {' and '.join(IMAGE_KINDS)} are known")
        for key in _REFUSED:
            if part.get(key) is not None:
                raise Malformed(f"{where} has {key}, which is not supported: it is given for all images")
        given = [key for key in _SOURCES if part.get(key) is not None]
        if not given and waiting:
            return self.written, [waiting.pop(0)]
        if len(given) != 1:
            raise Malformed(f"{where} names {' and '.join(given) or 'no image'}: one is needed")
        value = part[given[0]]
        count_unused(part, ("type", given[0]), unused, "of a part")
        if isinstance(value, dict):
            count_unused(value, ("url", "bytes", "path"), unused, "of an image")
        return self.written, [_source({given[0]: value} if given[0] in _IN_BASE64 else value, where)]

    def _read_file(self, name: str) -> bytes:
        path = os.path.normpath(os.path.join(self.folder, name))
        if os.path.commonpath([path, self.folder]) != self.folder:
            raise ImageError("lies outside of image_path")
        with open(path, "rb") as stream:
            return stream.read()


def _source(value: object, where: str) -> Source:
    """What a data set says of an image: the name of a file, a data: URL, bytes, or an object with one of these."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        inline = next((value[key] for key in _IN_BASE64 if value.get(key) is not None), None)
        if inline is not None:
            return _from_base64(inline, where)
        value = next((value[key] for key in ("url", "path") if value.get(key) is not None), None)
    if not isinstance(value, str) or not value:
        raise Malformed(f"{where} is no image: give a file's name, a data: URL, or an object with url, path or bytes")
    if value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Malformed(f"{where} is a data: URL without ;base64")
        return _from_base64(data, where)
    if "\0" in value:
        raise Malformed(f"{where} is no file's name: it holds a zero byte")
    value = value.removeprefix("file://")
    if "://" in value:
        raise Malformed(f"{where} is at {_shown(value)}: download it, and give its name in image_path")
    return value


def _shown(name: str) -> str:
    """A name as a sentence can have it."""
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]} ..."
    return name if name.isprintable() else repr(name)


def _from_base64(text: object, where: str) -> bytes:
    if isinstance(text, bytes):  # of parquet, as they are
        return text
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"{where} is no base64 ({error})") from error
