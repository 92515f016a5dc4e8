"""Selective activation checkpointing (arXiv:2205.05198): what is expensive to compute is kept, the rest runs again.

Results of matrix products and of attention kernels stay from forward to backward; norms, rotary embeddings, activation
functions and sums of a decoder layer are computed a second time. PyTorch does it, see
:func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`; here is only what counts as expensive.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

#: Operators whose results are kept, by schema. FlashAttention-4 is not an operator of PyTorch's: it runs again.
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_grouped_mm",
        "aten::_flash_attention_forward",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "fft::packed_attention",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "npu::npu_fusion_attention",
        # Of experts that are spread over ranks (fft/parallel/expert.py): rows are not sent again.
        "_c10d_functional::all_to_all_single",
    }
)


_GROUPED = "aten::_grouped_mm"


def kept_of(layer: nn.Module) -> frozenset[str]:
    """Those of :data:`KEPT` that can be kept of a decoder layer.

    Where experts have biases (gpt-oss), transformers adds them in place to a grouped product, which so runs again.
    """
    biased = any(".experts." in f".{name}" and name.endswith("bias") for name, _ in layer.named_parameters())
    return KEPT - {_GROUPED} if biased else KEPT


def selective(function: Callable[..., Any], *inputs: Any, kept: frozenset[str] = KEPT) -> Any:
    """Call ``function`` so that its backward recomputes all but the results of ``kept`` operators."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(
    kept: frozenset[str], _: SelectiveCheckpointContext, operator: Any, *__: object, **___: object
) -> CheckpointPolicy:
    keep = operator._schema.name in kept
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
