"""Linear layer and cross-entropy in one, in chunks, without ever holding [tokens, vocabulary] logits.

The idea is that of Liger's fused linear cross-entropy (arXiv:2410.10989): the gradient with respect to the logits is
known as soon as the logits are, so both gradients are formed in the forward pass, chunk by chunk. Untrained positions
are dropped before the matrix product: their logits are never computed.
"""

from typing import Any

import torch
from torch import Tensor

#: Labels with this value are not trained on (PyTorch's and Hugging Face's convention).
IGNORE = -100

#: Largest piece of logits held at once, in elements (64 Mi float32 = 256 MiB).
_MAX_LOGITS = 1 << 26


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        trained = (labels != IGNORE).nonzero().squeeze(-1)
        states, targets = hidden[trained], labels[trained]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=_accumulator(hidden), device=hidden.device)
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        rows = max(1, _MAX_LOGITS // weight.shape[0])
        for start in range(0, len(trained), rows):
            chunk, target = states[start : start + rows], targets[start : start + rows, None]
            logits = (chunk @ weight.t()).to(total.dtype)
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(1, target)).sum()
            if not (need_hidden or need_weight):
                continue
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
            grad = grad.to(weight.dtype)
            if need_hidden:
                dhidden[trained[start : start + rows]] = grad @ weight
            if need_weight:
                dweight += grad.t() @ chunk
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        # The factor is rounded with the product, not before it: it is the same for every element.
        scaled = (
            (g.to(grad_output.dtype) * grad_output).to(g.dtype) if g is not None else None for g in ctx.saved_tensors
        )
        return *scaled, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained tokens of the cross-entropy of ``hidden @ weight.T`` against ``labels``.

    ``hidden`` is [tokens, hidden size], ``weight`` [vocabulary, hidden size], ``labels`` int64 [tokens] already aligned
    with the position that predicts them, :data:`IGNORE` where nothing is predicted. Returns a float32 scalar (float64
    for float64 inputs), in nats.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
