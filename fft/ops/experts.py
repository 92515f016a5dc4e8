"""Experts that are spread over ranks, as transformers' own modules compute them: rows are sent to where they are.

It is one more implementation of transformers' interface for experts (``ALL_EXPERTS_FUNCTIONS``), so that every family
whose experts ask that interface has it. What a rank received is computed by the family's own implementation, grouped
matrix products where they exist, as if each row were a token with one expert.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fft.parallel.expert import ExpertParallel

#: The name under which :func:`spread_experts` is registered with transformers.
HF_EXPERTS = "fft_spread"
#: What transformers gives to modules that ask its interface.
_ASKS = "_is_expert_parallel"


def asks_interface(module: nn.Module) -> bool:
    """Whether a module is one of experts that transformers lets others compute."""
    return hasattr(module, _ASKS)


def spread_all(layer: nn.Module, ranks: ExpertParallel) -> None:
    """Let the experts within ``layer``, of which this rank has one in ``ranks.size``, compute what all would."""
    experts: Any
    for experts in filter(asks_interface, layer.modules()):
        experts.experts_ranks, experts.experts_config = ranks, experts.config
        experts.num_experts = experts.num_experts // ranks.size
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = _register()


def spread_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts make of ``hidden_states`` [tokens, hidden size]; of the same shape.

    ``top_k_index`` and ``top_k_weights`` are [tokens, top k]: the experts of each token, and what they count.
    Collective: all ranks of the group, in forward and in backward, each with tokens of its own, as many as it has.
    """
    ranks: ExpertParallel = module.experts_ranks
    (tokens, top_k), experts = top_k_index.shape, module.num_experts * ranks.size
    pairs = top_k_index.reshape(-1)
    order = pairs.argsort(stable=True)  # by expert, and so by rank
    number = torch.zeros(experts, dtype=torch.int64, device=pairs.device)
    received, sends, receives = ranks.counts(number.index_add_(0, pairs, torch.ones_like(pairs)), len(pairs))
    rows = ranks.exchange(hidden_states[order // top_k], sends, receives)
    # Weights travel, too: so their gradients are formed where the products are, and what comes back need not be kept.
    weights = ranks.exchange(top_k_weights.reshape(-1, 1)[order], sends, receives)
    rows = _compute(module, rows, _expert_of(received, sum(receives)), weights)
    rows = ranks.bring_back(rows, receives, sends, order)
    return rows.view(tokens, top_k, hidden_states.shape[-1]).sum(1).to(hidden_states.dtype)


def _expert_of(received: Tensor, rows: int) -> Tensor:
    """Which of this rank's experts each received row is for, int64 [rows]; ``received`` is [ranks, own experts]."""
    own = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return own.repeat_interleave(received.flatten(), output_size=rows)


def _compute(module: Any, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """This rank's experts on ``rows``, of which there may be none: a row of zeros then gives all weights a gradient."""
    kind = type(module)
    own = ALL_EXPERTS_FUNCTIONS.get_interface(
        module.experts_config._experts_implementation, getattr(kind.forward, "__wrapped__", kind.forward)
    )
    count = len(rows)
    if not count:
        rows, experts = torch.cat((rows, rows.new_zeros(1, rows.shape[1]))), experts.new_zeros(1)
        weights = torch.cat((weights, weights.new_zeros(1, 1)))
    return own(module, rows, experts[:, None], weights)[:count]


@lru_cache(maxsize=1)
def _register() -> str:
    ALL_EXPERTS_FUNCTIONS.register(HF_EXPERTS, spread_experts)
    return HF_EXPERTS
