"""Rotary embeddings: one for all layers of a decoder or, where transformers asks for it, one for each type of layer."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fft.models.vision import decoder_of

#: Cosines and sines [1, tokens, width]; or both as complex numbers (DeepSeek-V2).
Turns = tuple[Tensor, Tensor] | Tensor


def map_turns(turns: Turns | None, function: Callable[[Tensor], Tensor]) -> Turns | None:
    """The same of ``function`` of each tensor."""
    if turns is None:
        return None
    return function(turns) if isinstance(turns, Tensor) else (function(turns[0]), function(turns[1]))


class Rotary:
    """A model's rotary embedding on ``device``; its buffers are computed, never stored."""

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
        decoder = decoder_of(model)
        module = getattr(decoder, "rotary_emb", None)
        self._module = None if module is None else type(module)(config=decoder.config).to(device)
        by_type = module is not None and "layer_type" in inspect.signature(module.forward).parameters
        #: How many axes positions have, where a model has several; 0 where not.
        self.axes = len((decoder.config.rope_parameters or {}).get("mrope_section", ()))
        self._types = decoder.config.layer_types if by_type else None

    def kind(self, layer: int) -> str | None:
        """What tells the embedding of a decoder layer from those of others; None where all have the same."""
        return None if self._types is None else self._types[layer]

    def turns(self, hidden: Tensor, positions: Tensor, kind: str | None) -> Turns | None:
        """Cosines and sines for ``positions`` [1, tokens] or [3, 1, tokens], of the type and the device of ``hidden``.

        None for a model without positions.
        """
        if self._module is None:
            return None
        if self.axes:  # time, height, width: texts count up on all
            positions = positions.expand(self.axes, *positions.shape[-2:])
        if kind is None:
            return self._module(hidden, position_ids=positions)
        return self._module(hidden, position_ids=positions, layer_type=kind)
