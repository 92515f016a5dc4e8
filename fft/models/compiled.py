"""Decoder layers as one graph each, for a compiler that fuses what is between their products."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from transformers import PretrainedConfig

from fft.errors import UserError, one_line
from fft.files import private_folder
from fft.models.recurrent import KIND

#: Where what is compiled is kept.
_CACHE = "TORCHINDUCTOR_CACHE_DIR"

P = ParamSpec("P")
R = TypeVar("R")

#: Graphs that one piece of code may have: of each kind of layer in training and evaluation, for states that need a
#: gradient and for those that do not, of fixed and of any length.
_GRAPHS = 64


def compiler_of(device: str) -> str:
    """The backend of torch.compile on a type of device. Raises :class:`UserError` where there is none.

    On a CPU, where compiled layers were no faster, graphs are traced, and run operator by operator.
    """
    if device == "cpu":
        return "aot_eager"
    if device == "cuda" and find_spec("triton"):
        return "inductor"
    why = "Triton, which is not installed" if device == "cuda" else "an NVIDIA GPU or a CPU"
    raise UserError(f"--compile needs {why}: train without it.")


def compiled(function: Callable[P, R], compiler: str | None) -> Callable[P, R]:
    """``function`` as one graph by a backend of torch.compile; itself without.

    Raises :class:`UserError` where no folder of this user alone can hold what is compiled.
    """
    if compiler is None:
        return function
    if _CACHE not in os.environ:  # torch's own is called after the user, and code in it is run, whoever has made it
        try:
            os.environ[_CACHE] = str(private_folder("fft-compiled"))
        except OSError as error:
            raise UserError(f"--compile: {one_line(error)}: set {_CACHE} to a folder of your own.") from error
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, backend=compiler)


def check_compiles(config: PretrainedConfig, shared: dict[str, int]) -> None:
    """Raise :class:`UserError` for a model, or a layout, whose layers are no graph; ``shared`` are sizes by flag."""
    for flag, size in shared.items():
        if size > 1:
            raise UserError(
                f"--compile: {flag} must be 1, as what such ranks exchange within a layer is no part of a graph."
            )
    if KIND in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise UserError(
            f"--compile: linear attention of model type {config.model_type!r} runs once for each document, which is "
            "no graph for others: train without it."
        )
