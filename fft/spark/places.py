"""Which places a run reads and writes, and whether a machine sees them.

A machine that has another folder under the same path is found out, too: the driver leaves a token beside what is to be
written, all others look for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pyarrow import fs

from fft.data.blend import data_places
from fft.data.delta import split_name
from fft.data.storage import Storage, is_url
from fft.errors import UserError
from fft.files import nearest_folder
from fft.train_arguments import TrainArguments

#: Flags of what is read, and of what is written.
_READ = ("model", "adapter_name_or_path", "tokenizer", "from_ckpt", "train_data", "eval_data", "sample_prompts")
_WRITTEN = ("output_dir", "checkpoint", "upload")


def places_read(args: TrainArguments) -> list[tuple[str, str]]:
    """Flags and places that a run reads; of a blend each table, without its version.

    Raises :class:`UserError` for weights of a blend that are none.
    """
    found = []
    for name in _READ:
        value = getattr(args, name)
        for place in [] if not value else data_places(value, name) if name.endswith("_data") else [value]:
            found.append((name, split_name(place)[0]))
    return [(name, place) for name, place in found if "*" not in place]


def check_read(places: list[tuple[str, str]], where: str) -> None:
    """Raise :class:`UserError` for the first place that this machine, ``where`` in a sentence, does not see."""
    for name, place in places:
        if Storage.at(place).info().type == fs.FileType.NotFound:
            raise UserError(
                f"--{name} {place} is not there {where}: name a folder that the driver and all executors share, with "
                "its whole path, or a URL."
            )


@contextmanager
def tokens_beside(args: TrainArguments, token: str) -> Iterator[Mapping[str, str]]:
    """Leave a file named ``token`` near each place that a run writes, until the block ends: flags to folders.

    Raises :class:`UserError` where nothing can be written.
    """
    beside = {name: _beside(place) for name in _WRITTEN if (place := getattr(args, name))}
    try:
        for folder in {*beside.values()}:
            Storage.at(folder).write(token, b"")
        yield beside
    finally:
        remove_tokens(beside, token)


def check_tokens(beside: Mapping[str, str], token: str, where: str) -> None:
    """Raise :class:`UserError` where this machine, ``where`` in a sentence, does not find what the driver left."""
    for name, folder in beside.items():
        if not Storage.at(folder).exists(token):
            raise UserError(
                f"--{name}: {folder} is another folder {where} than on the driver: name one that the driver and all "
                "executors share, with its whole path, or a URL."
            )


def remove_tokens(beside: Mapping[str, str], token: str) -> None:
    """Remove what :func:`tokens_beside` left."""
    for folder in {*beside.values()}:
        storage = Storage.at(folder)
        if storage.exists(token):
            storage.delete([token])


def _beside(place: str) -> str:
    """The folder itself or, as long as there is none, the nearest above it; of a store the one above."""
    if is_url(place) and not Storage.at(place).is_local:
        scheme, _, path = place.rstrip("/").partition("://")
        return f"{scheme}://{path.rpartition('/')[0] or path}"
    return str(nearest_folder(Storage.at(place).root))
