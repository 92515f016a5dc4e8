"""What ``--task`` and its flags mean: the encoder of records that they name, loaded on the driver."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fft.corpus.files import Source
from fft.data.manifest import TokenizerInfo
from fft.data.views import view
from fft.errors import UserError
from fft.images.rules import ImageLimits, ImageSettings
from fft.text.chat import load_chat
from fft.text.preference import load_preference
from fft.text.pretrain import load_pretrain
from fft.text.records import Keys, RecordEncoder
from spark_jobs.token_table.output import local_path, place_at

Load = Callable[[], tuple[RecordEncoder[Any], TokenizerInfo]]


def encoder_loader(
    tokenizer: str | Path,
    task: str,
    keys: Keys,
    max_len: int | None,
    eos: str,
    parse_special_tokens: bool,
    images: ImageSettings | None,
) -> Load:
    """What loads the encoder, which takes seconds. Raises :class:`UserError` for parameters of another task."""
    directory = view(place_at(tokenizer, "tokenizer"))
    if task != "pretrain":
        changed = {"text_key": keys.text != "text", "eos": eos != "auto", "parse_special_tokens": parse_special_tokens}
        for name, given in changed.items():
            if given:
                raise UserError(f'`{name}` is for `task="pretrain"`: the chat template decides; leave it out.')
        if task == "preference":
            return partial(load_preference, directory, keys.id, max_len)
        return partial(load_chat, directory, keys.id, max_len, images)
    return partial(load_pretrain, directory, keys, max_len, eos, parse_special_tokens)


def image_settings(image_path: str | Path | None, limits: ImageLimits, task: str) -> ImageSettings | None:
    """None where no images are read. Raises :class:`UserError` for what is no folder, and for what needs it."""
    if image_path is None:
        if given := limits.given:
            raise UserError(f"`{given[0]}` is a limit of images: give `image_path`, the folder in which they lie.")
        return None
    if task != "chat":
        what = "texts" if task == "pretrain" else "preferences"
        raise UserError(f'`image_path` is for `task="chat"`: {what} have no images; leave it out.')
    folder = local_path(image_path, "image_path")
    if not folder.is_dir():
        raise UserError(f"`image_path` {folder} is no folder: give the one in which the images of the chats lie.")
    return ImageSettings(str(folder.absolute()), limits)


def check_sources(sources: Sequence[Source], task: str) -> None:
    """Raise :class:`UserError` for plain text that shall be chats or preferences."""
    for source in sources:
        if task != "pretrain" and source.kind == "text":
            raise UserError(
                f'`inputs` {source.name} holds plain text, but `task="{task}"` needs JSON lines or parquet.'
            )
