"""A model in the form of the original that it was made from: under its names, beside its config, code and tokenizer."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fft.checkpoint.card import CARD
from fft.checkpoint.conversion import DTYPES, shards, tell_odd, write_shards
from fft.checkpoint.model_folder import staged
from fft.data.model_files import check_file
from fft.errors import UserError
from fft.files import copy_file, write_atomically
from fft.models.directory import Weights
from fft.weights import hf
from fft.weights.files import INDEX, opened, weight_files
from fft.weights.names import StoredNames, StoredRows, put
from fft.weights.originals import original_of, translate


class OriginalForm:
    """The weights of ``source`` as the original in a directory has them: its names, its pieces.

    Raises :class:`UserError` where that is no original of another form, and where the source is another model.
    """

    def __init__(self, source: Weights, like: Path) -> None:
        self._source, self.dtype = source, source.dtype
        self._files = weight_files(like)
        config = hf.read_json(like / hf.CONFIG)
        if original_of(config) is None or not self._files:
            raise UserError(f"--like {like} is no original with weights, of a family that transformers does not have.")
        places = translate(config, [*self._files])
        rows = {name: (place,) for name, place in places.items() if isinstance(place, StoredRows)}
        self._joined = StoredNames(rows)
        self._names = {place: name for name, place in places.items() if isinstance(place, str)}
        made = {piece.name for pieces in rows.values() for piece in pieces}
        self._stored = [name for name in self._files if name in made or name in self._names]
        if differing := sorted(set(places).symmetric_difference(source.names)):
            which = "lacks" if differing[0] in places else "has"
            raise UserError(f"--like {like} is another model: what is read {which} {differing[0]}.")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as the original has them."""
        return self._stored

    def tensor(self, name: str) -> Tensor:
        """One of them. Raises :class:`UserError` where the original's is of another shape."""
        with opened(self._files[name]) as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
        if name in self._names:
            whole = self._source.tensor(self._names[name])
            self._check(name, tuple(whole.shape), shape)
            return whole
        whole = None
        for use in self._joined.uses(name, shape):
            part = self._source.tensor(use.parameter)
            self._check(name, (use.rows.length, *shape[1:]), tuple(part.shape))
            whole = part.new_empty(shape) if whole is None else whole
            put(whole, use, part)
        return torch.empty(shape) if whole is None else whole

    def _check(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise UserError(f"{name} is of {wanted} in the original, not {found}: --like names another model.")


def write_like(source: Weights, like: Path, output: str, dtype: str | None, limit: int, card: str | None = None) -> int:
    """Write ``source`` as the original ``like`` is written, beside all else that its directory has but its card, where
    one is given; returns the number of tensors.

    Raises :class:`UserError` as :class:`OriginalForm` does, and where nothing can be written.
    """
    form = OriginalForm(source, like)
    with ExitStack() as held:
        try:
            staging = held.enter_context(staged(output))
        except OSError as error:
            raise UserError(f"{output} cannot be made ({error.strerror}): choose another folder.") from error
        number, odd = write_shards(staging, shards(form, DTYPES[dtype] if dtype else source.dtype, limit))
        hf.write_index(staging, number)
        weights = {file.name for file in form._files.values()}
        for file in like.iterdir():
            if file.is_file() and file.name not in weights and not file.name.endswith((INDEX, ".bin.index.json")):
                check_file(file, like)
                copy_file(file, staging / file.name)
        if card is not None:
            write_atomically(staging / CARD, card)
    tell_odd(odd)
    return len(form.names)
