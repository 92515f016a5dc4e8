"""Linear layer and cross-entropy in one, in chunks, without ever holding [tokens, vocabulary] logits.

The idea is that of Liger's fused linear cross-entropy (arXiv:2410.10989): the gradient with respect to the logits is
known as soon as the logits are, so both gradients are formed in the forward pass, chunk by chunk. Untrained positions
are dropped before the matrix product: their logits are never computed.

Where the vocabulary is shared out over tensor-parallel ranks (Megatron-LM, arXiv:1909.08053), each forms the logits of
its own rows, and three numbers a token are reduced: two for the log-sum-exp, and the target's logit.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fft.parallel.tensor import TensorParallel
from fft.parallel.tensor_plan import Shard

#: Labels with this value are not trained on (PyTorch's and Hugging Face's convention).
IGNORE = -100

#: Largest chunk of logits held at once, in elements (64 Mi float32 = 256 MiB).
MAX_LOGITS = 1 << 26

#: Elements that are scaled at once.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Vocabulary:
    """How logits are made of scores, and by whom: with a ``cap`` c they are c * tanh(scores / c). With ``ranks``, each
    has the scores of its ``shard`` of the vocabulary's rows.
    """

    shard: Shard | None = None
    ranks: TensorParallel | None = None
    cap: float | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocabulary: Vocabulary
    ) -> Tensor:
        shard, ranks, cap = vocabulary.shard, vocabulary.ranks, vocabulary.cap
        trained = (labels != IGNORE).nonzero().squeeze(-1)
        states, targets = hidden[trained], labels[trained]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=_accumulator(hidden), device=hidden.device)
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        dbias = None if bias is None or not need_bias else torch.zeros_like(bias, dtype=total.dtype)
        # The same on all ranks, whose parts may differ by a row: they reduce chunk by chunk.
        first, columns = 0, weight.shape[0]
        if shard is not None and ranks is not None:
            first, columns = shard.spans[0][0], -(-shard.shape[0] // ranks.size)
        rows = max(1, MAX_LOGITS // columns)
        for start in range(0, len(trained), rows):
            chunk, target = states[start : start + rows], targets[start : start + rows, None] - first
            logits = (chunk @ weight.t()).to(total.dtype)
            if bias is not None:
                logits += bias
            if cap is not None:
                logits.div_(cap).tanh_().mul_(cap)
            own = target.clamp(0, logits.shape[1] - 1)
            hit = (own == target).to(logits.dtype)
            score = logits.gather(1, own) * hit
            grad = logits.softmax(-1)
            lse = logits.amax(-1, keepdim=True) - grad.amax(-1, keepdim=True).log()
            if ranks is not None:
                lse, score = _of_all(lse, score, grad, ranks)
            total += (lse - score).sum()
            if dhidden is None and dweight is None and dbias is None:
                continue
            grad.scatter_add_(1, own, -hit)
            if cap is not None:
                grad *= logits.div_(cap).square_().neg_().add_(1)
            del logits  # the memory of two chunks is all that is held
            if dbias is not None:
                dbias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if dhidden is not None:
                dhidden[trained[start : start + rows]] = grad @ weight
            if dweight is not None:
                dweight += grad.t() @ chunk
            del grad
        if dhidden is not None and ranks is not None:
            ranks.all_reduce(dhidden)
        sums = [None if x is None else x.to(weight.dtype) for x in (dweight, dbias)]
        ctx.save_for_backward(dhidden, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,), grads = grad_outputs, ctx.saved_tensors
        for grad in grads:
            if grad is not None:
                _scale(grad, grad_output)
        return *grads, None, None


def _scale(x: Tensor, factor: Tensor) -> None:
    """Multiply in place. The factor is the same for every element: it must not be rounded before the product is."""
    if x.dtype == factor.dtype:
        x.mul_(factor)
        return
    for chunk in x.view(-1).split(_CHUNK):
        chunk.copy_(chunk.to(factor.dtype) * factor)


def _of_all(lse: Tensor, score: Tensor, softmax: Tensor, ranks: TensorParallel) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target's logit over the parts of all ranks; ``softmax`` becomes this part of the whole one."""
    largest = ranks.all_reduce(lse.clone(), dist.ReduceOp.MAX)
    sums, score = ranks.all_reduce(torch.cat([(lse - largest).exp(), score], dim=1)).split(1, dim=1)
    whole = largest + sums.log()
    softmax.mul_((lse - whole).exp())
    return whole, score


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum over trained tokens of the cross-entropy of ``hidden @ weight.T + bias`` against ``labels``.

    ``hidden`` is [tokens, hidden size], ``weight`` [vocabulary, hidden size], ``bias`` [vocabulary], ``labels`` int64
    [tokens] already aligned with the position that predicts them, :data:`IGNORE` where nothing is predicted. Returns a
    float32 scalar (float64 for float64 inputs), in nats.

    With ranks that share the ``vocabulary``, ``weight`` and ``bias`` are this rank's part of it; ``hidden`` and
    ``labels``, and the result, are the same on all of them. Collective then: all ranks call it, and its backward does
    not communicate.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary or Vocabulary())


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
