"""Weights in the files that DeepSpeed's own checkpoints have of a pipeline's layers."""

import re
from pathlib import Path

import torch
from torch import Tensor

from fft.errors import UserError, one_line
from fft.models.spec import ModelSpec
from fft.weights.files import check_here

_NAME = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_PATTERN = "layer_*-model_states.pt"


def has_layer_files(directory: Path) -> bool:
    """Whether a directory holds such files."""
    return any(directory.glob(_PATTERN))


class LayerFiles:
    """Weights in layer files of ``directory``, by Hugging Face name.

    Layers are numbered as :func:`fft.models.layers.pipeline_layers` lists them: embedding, decoder layers, whole or
    in halves, norm, head. Raises :class:`UserError` when the files are not those of such a model.
    """

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        layers = spec.text.num_hidden_layers
        self.dtype: torch.dtype | None = None
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        files: dict[int, Path] = {}
        for path in sorted(directory.glob(_PATTERN)):
            found = _NAME.fullmatch(path.name)
            if found is None:
                raise UserError(f"{path} is no layer file of DeepSpeed's: move it elsewhere.")
            if int(found[2] or 0):
                raise UserError(f"{path}: tensor-parallel layer files are not read; merge them with DeepSpeed first.")
            files[int(found[1])] = path
        halves = 2 if 1 in files and not any("mlp." in key for key in self._read(files[1])) else 1
        wanted = range(halves * layers + (2 if spec.tied else 3))
        if set(files) != set(wanted):
            raise UserError(
                f"{directory} has files of layers {', '.join(map(str, files))}; a model of {layers} decoder layers has "
                f"0 to {wanted[-1]}: restore them or give its --model."
            )
        decoder = [f"{spec.base}.layers.{index}" for index in range(layers) for _ in range(halves)]
        paths = [spec.embedding, *decoder, spec.norm, spec.output]
        self._stored: dict[str, tuple[Path, str]] = {}
        for layer, file in sorted(files.items()):
            for key in self._read(file):
                self._stored[f"{paths[layer]}.{key.removeprefix('module.')}"] = file, key

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._stored)

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        file, key = self._stored[name]
        return self._read(file)[key]

    def _read(self, file: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != file:
            check_here(file)
            try:
                self._open = file, torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except (RuntimeError, ValueError, EOFError, OSError) as error:
                raise UserError(f"{file} cannot be read ({one_line(error)[:120]}): restore it.") from error
        return self._open[1]
