"""Linear layer and cross-entropy in one, in pieces, without ever holding [tokens, vocabulary] logits.

The idea is that of Liger's fused linear cross-entropy (arXiv:2410.10989): the gradient with respect to the logits is
known as soon as the logits are, so both gradients are formed in the forward pass, piece by piece. Untrained positions
are dropped before the matrix product: their logits are never computed. Logits become their gradient where they are, and
the product that makes the weight's gradient adds it to a sum in fp32 by itself.

Where the vocabulary is shared out over tensor-parallel ranks (Megatron-LM, arXiv:1909.08053), each forms the logits of
its own rows, and three numbers a token are reduced: two for the log-sum-exp, and the target's logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fft.data.known import IGNORE
from fft.ops.documents import lse_dtype
from fft.ops.logits import FusedLogits, MakeLogits, choose_logits
from fft.parallel.tensor import TensorParallel
from fft.parallel.tensor_plan import Shard

#: Bytes that a piece's logits may take, with what they become on the way to their gradient.
PIECE = 1 << 29

#: Pieces have a multiple of so many rows, where they have as many: what the tiles of matrix products divide.
_TILE = 256


class Targets(NamedTuple):
    """What is trained on: int64 ``positions`` of tokens, ascending, and the ``ids`` that are predicted there."""

    positions: Tensor
    ids: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Targets":
        """From labels [tokens], :data:`IGNORE` where nothing is predicted. The host waits for their device."""
        positions = (labels != IGNORE).nonzero().squeeze(-1)
        return cls(positions, labels[positions])


@dataclass(frozen=True)
class Vocabulary:
    """How logits are made of scores, and by whom: with a ``cap`` c they are c * tanh(scores / c). With ``ranks``, each
    has the scores of its ``shard`` of the vocabulary's rows.
    """

    shard: Shard | None = None
    ranks: TensorParallel | None = None
    cap: float | None = None

    @property
    def first(self) -> int:
        """The first of this rank's rows."""
        return 0 if self.shard is None else self.shard.spans[0][0]

    def most(self, rows: int) -> int:
        """Of the ``rows`` that a rank has, the most that any has: ranks reduce pieces of the same tokens."""
        return rows if self.shard is None or self.ranks is None else -(-self.shard.shape[0] // self.ranks.size)


@dataclass(frozen=True)
class HeadSum:
    """Where gradients of the head's weight are added up, and the ``factor`` by which backward will multiply the loss's.

    Known before, it is part of the products, and nothing is scaled afterwards. ``total`` is [vocabulary, hidden size],
    float32 or wider; if it is ``empty``, what is in it is written over.
    """

    total: Tensor
    empty: bool
    factor: float


def logit_bytes(itemsize: int, fused: bool = False, capped: bool = False) -> int:
    """Bytes that are held for a logit of weights of ``itemsize``: a half type's beside a float32, unless ``fused``, and
    beside its gradient if it is ``capped``.
    """
    if fused:
        return itemsize
    return (itemsize if itemsize >= 4 else itemsize + 4) + (max(4, itemsize) if capped else 0)


def piece_rows(columns: int, each: int) -> int:
    """Rows of a piece, whose logits take ``each`` bytes."""
    rows = max(1, PIECE // (columns * each))
    return rows // _TILE * _TILE or rows


@dataclass
class _Gradients:
    """What pieces add to: gradients of trained states, of weight and bias, None where none are asked for."""

    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    factor: float
    empty: bool

    def __bool__(self) -> bool:
        return not self.states is self.weight is self.bias is None

    def add(self, piece: slice, logits: Tensor, states: Tensor, weight: Tensor) -> None:
        """The gradients for those of the piece's ``logits``, which were made of ``states`` and ``weight``."""
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if self.states is not None:
            self.states[piece].addmm_(logits, weight, beta=0, alpha=self.factor)
        if self.weight is not None:
            _add_product(self.weight, logits.t(), states, self.factor, self.empty)
            self.empty = False

    def finish(self, ranks: TensorParallel | None) -> None:
        """After the last piece, if there was one."""
        if self.weight is not None and self.empty:
            self.weight.zero_()
        if self.states is not None and ranks is not None:
            ranks.all_reduce(self.states)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        vocabulary: Vocabulary,
        head: HeadSum | None,
        each: list[Tensor],
    ) -> Tensor:
        states, ids, ranks = hidden[targets.positions], targets.ids[:, None] - vocabulary.first, vocabulary.ranks
        losses = torch.empty(len(states), 1, dtype=lse_dtype(hidden), device=hidden.device)
        grads = _gradients(ctx.needs_input_grad, states, weight, bias, head)
        make, rows = _pieces(weight, vocabulary)
        for start in range(0, len(states), rows):
            piece = slice(start, start + rows)
            logits = make(states[piece] @ weight.t(), ids[piece], bias, vocabulary.cap)
            lse, score = logits.lse, logits.score
            if ranks is not None:
                lse, score = _of_all(lse, score, ranks)
            torch.sub(lse, score, out=losses[piece])
            if grads:
                grad = logits.gradient(lse)
                del logits  # what is held beside one piece, at most, is its gradient as the product takes it
                grads.add(piece, grad, states[piece], weight)
                del grad
        grads.finish(ranks)
        ctx.save_for_backward(targets.positions, grads.states, None if head else grads.weight, grads.bias)
        ctx.shape, ctx.dtype, ctx.scaled = hidden.shape, weight.dtype, head is not None
        each.append(losses.squeeze(1))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,), (positions, dstates, dweight, dbias) = grad_outputs, ctx.saved_tensors
        dhidden = None
        if dstates is not None:
            dhidden = dstates.new_zeros(ctx.shape)
            dhidden[positions] = dstates if ctx.scaled else _scaled(dstates, factor, ctx.dtype)
        return dhidden, _scaled(dweight, factor, ctx.dtype), _scaled(dbias, factor, ctx.dtype), None, None, None, None


def _gradients(
    needed: Sequence[bool], states: Tensor, weight: Tensor, bias: Tensor | None, head: HeadSum | None
) -> _Gradients:
    """Those that are ``needed`` of states, weight and bias, of which the second may have a place: ``head``."""
    wide = lse_dtype(weight)
    dstates = torch.empty_like(states) if needed[0] else None
    dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
    if head is not None:
        return _Gradients(dstates, head.total if needed[1] else None, dbias, head.factor, head.empty)
    dweight = torch.empty_like(weight, dtype=wide) if needed[1] else None
    return _Gradients(dstates, dweight, dbias, 1.0, empty=True)


def _scaled(x: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The product in ``dtype``, in place where it is the same type. It is rounded once.

    A factor without a dimension, the same for all elements, would be rounded to the type of ``x`` by itself.
    """
    if x is None:
        return None
    return torch.mul(x, factor.view([1] * x.ndim), out=x if x.dtype == dtype else torch.empty_like(x, dtype=dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, empty: bool) -> None:
    """Add ``factor * a @ b`` to ``total`` in its type, within the product where there is one that can."""
    beta = 0 if empty else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta, alpha=factor)
    elif _widens(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=factor, out=total)
    elif total.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=factor)
    else:
        (total.zero_() if empty else total).add_(a @ b, alpha=factor)


@lru_cache(maxsize=16)
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device's product of a half type can be float32, unrounded."""
    total, a = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


class _TokenLogProbs(torch.autograd.Function):
    """Where the head is not trained, a token's gradient is a row by itself, which backward multiplies: logits are made
    once, and gradients of states formed of them, as :class:`_LinearCrossEntropy` does. Gradients of the head are sums
    over tokens, each times what is known in backward alone, which makes the logits once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, vocabulary: Vocabulary
    ) -> Tensor:
        states, ids = hidden[targets.positions], targets.ids[:, None] - vocabulary.first
        found = torch.empty(2, len(states), 1, dtype=lse_dtype(hidden), device=hidden.device)
        ctx.vocabulary, ctx.shape, ctx.once = vocabulary, hidden.shape, not any(ctx.needs_input_grad[1:3])
        grads = _gradients([ctx.once and ctx.needs_input_grad[0], False, False], states, weight, bias, None)
        make, rows = _pieces(weight, vocabulary)
        for start in range(0, len(states), rows):
            piece = slice(start, start + rows)
            logits = make(states[piece] @ weight.t(), ids[piece], bias, vocabulary.cap)
            lse, score = logits.lse, logits.score
            if vocabulary.ranks is not None:
                lse, score = _of_all(lse, score, vocabulary.ranks)
            found[0, piece], found[1, piece] = lse, score
            if grads:
                grads.add(piece, logits.gradient(lse), states[piece], weight)
            del logits
        grads.finish(vocabulary.ranks)
        kept = (grads.states, targets.positions) if ctx.once else (hidden, weight, bias, *targets, found[0])
        ctx.save_for_backward(*kept)
        return (found[1] - found[0]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = grad_outputs
        factors = -factors[:, None]  # gradients are those of the loss, which is the log-probability's negative
        if ctx.once:
            dstates, positions = ctx.saved_tensors
            dweight = dbias = None
            torch.mul(dstates, factors, out=dstates)
        else:
            hidden, weight, bias, positions, *rest = ctx.saved_tensors
            grads = _once_more(ctx, hidden[positions], weight, bias, rest, factors)
            dstates = grads.states
            dweight, dbias = (x if x is None else x.to(weight.dtype) for x in (grads.weight, grads.bias))
        dhidden = None
        if dstates is not None:
            dhidden = dstates.new_zeros(ctx.shape)
            dhidden[positions] = dstates
        return dhidden, dweight, dbias, None, None


def _once_more(
    ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Tensor], factors: Tensor
) -> _Gradients:
    """The gradients of all, of logits that are made again; ``rest`` are targets' ids, and their log-sum-exp."""
    (ids, lse), vocabulary = rest, ctx.vocabulary
    ids = ids[:, None] - vocabulary.first
    grads = _gradients(ctx.needs_input_grad, states, weight, bias, None)
    make, rows = _pieces(weight, vocabulary)
    for start in range(0, len(states), rows):
        piece = slice(start, start + rows)
        logits = make(states[piece] @ weight.t(), ids[piece], bias, vocabulary.cap)
        grad = logits.gradient(lse[piece])
        del logits
        grads.add(piece, grad.mul_(factors[piece]), states[piece], weight)
        del grad
    grads.finish(vocabulary.ranks)
    return grads


def _pieces(weight: Tensor, vocabulary: Vocabulary) -> tuple[MakeLogits, int]:
    """What makes logits of a weight of this kind, and of how many rows at once."""
    make = choose_logits(weight.device, weight.dtype)
    each = logit_bytes(weight.itemsize, make is FusedLogits, vocabulary.cap is not None)
    return make, piece_rows(vocabulary.most(len(weight)), each)


def _of_all(lse: Tensor, score: Tensor, ranks: TensorParallel) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target's score over the parts of all ranks."""
    largest = ranks.all_reduce(lse.clone(), dist.ReduceOp.MAX)
    sums, score = ranks.all_reduce(torch.cat([(lse - largest).exp(), score], dim=1)).split(1, dim=1)
    return largest + sums.log(), score


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | Targets,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
    *,
    head: HeadSum | None = None,
    each: list[Tensor] | None = None,
) -> Tensor:
    """Sum over trained tokens of the cross-entropy of ``hidden @ weight.T + bias`` against ``labels``.

    ``hidden`` is [tokens, hidden size], ``weight`` [vocabulary, hidden size], ``bias`` [vocabulary], ``labels`` int64
    [tokens] already aligned with the position that predicts them, :data:`IGNORE` where nothing is predicted; or what is
    made of them on the host, which then need not wait. Returns a float32 scalar (float64 for float64 inputs), in nats.

    With a ``head`` the weight's gradient is added to that, now, and backward has none for it: it must be called, with
    the factor that was given. Nothing is added where gradients are not recorded. ``each`` takes the losses [targets].

    With ranks that share the ``vocabulary``, ``weight`` and ``bias`` are this rank's part of it; ``hidden`` and
    ``labels``, and the result, are the same on all of them. Collective then: all ranks call it, and its backward does
    not communicate.
    """
    targets = labels if isinstance(labels, Targets) else Targets.of(labels)
    hidden, weight, bias = _recorded(hidden, weight, bias)
    each = [] if each is None else each
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, vocabulary or Vocabulary(), head, each)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The log-probability of each target, float32 [targets] (float64 for float64 inputs), in nats.

    As :func:`linear_cross_entropy`, but for losses that need each by itself: of a head that is trained backward makes
    the logits once more, since what their gradients are multiplied by is not known before. With ranks that share the
    ``vocabulary``, collective in forward, and then in backward.
    """
    hidden, weight, bias = _recorded(hidden, weight, bias)
    return _TokenLogProbs.apply(hidden, weight, bias, targets, vocabulary or Vocabulary())


def _recorded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As functions take them, which see that parameters ask for gradients where none are recorded, too."""
    if torch.is_grad_enabled():
        return hidden, weight, bias
    return hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
