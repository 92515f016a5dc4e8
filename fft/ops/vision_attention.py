"""Attention of vision towers: every patch of an image sees every other of it, and none of another image's."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from fft.ops.attention import segment_attention
from fft.ops.backends.choice import choose
from fft.ops.documents import Documents, Segments

#: The name under which :func:`tower_attention` is registered: towers hand images over in one call, with their
#: boundaries, to what has "flash" in its name, and one by one to what has not.
HF_NAME = "fft_flash_vision"


def tower_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    images: Documents | None = None,
    attention: str = "auto",
    is_causal: bool = False,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within ``images`` of a row of patches or, without them, within each entry of the first dimension.

    Takes [1, heads, patches, head size], or [tiles, heads, patches, head size], and returns [.., patches, heads, head
    size] and None for the weights. ``attention`` names the backend, see :func:`fft.ops.backends.choice.choose`. Raises
    ValueError for what a tower may ask for and would silently not get: a mask, dropout, or causal attention.
    """
    if attention_mask is not None or dropout or is_causal:
        raise ValueError("attention of towers takes no mask and no dropout, and is not causal")
    count, heads, patches, size = query.shape
    q, k, v = (x.transpose(1, 2).reshape(count * patches, heads, size) for x in (query, key, value))
    if images is None:
        images = Documents.of(tuple(range(0, count * patches + 1, patches)), q.device)
    backend = choose(q.device, q.dtype, attention, size)
    out = segment_attention(q, k, v, Segments(images, images, False, scaling), backend)
    return out.view(count, patches, heads, size), None


@lru_cache(maxsize=1)
def register_tower_attention() -> str:
    """Make :func:`tower_attention` known to transformers and return its name for ``_attn_implementation``."""
    AttentionInterface.register(HF_NAME, tower_attention)
    return HF_NAME


def attend_so(tower: Any) -> None:
    """Have a tower of transformers attend by :func:`tower_attention`.

    It is built with another name: one with "flash" in it would be looked for on the Hub.
    """
    name = register_tower_attention()
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
