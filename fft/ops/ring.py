"""Causal attention over packed documents whose tokens are spread over ranks (ring attention, arXiv:2310.01889).

What is computed and what travels is planned on the host, see :mod:`fft.parallel.ring_plan`. Keys and values of a step
are in flight while those of the step before are computed with; their gradients return while the next are computed.
Partial results are merged, and all gradients summed, in float32 and in the order of the steps, so that results do not
depend on timing. Queries never travel, and nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fft.ops.backends import Backend
from fft.ops.documents import Documents, Segments, lse_dtype
from fft.parallel.ring_plan import RankPlan, Span


class Exchange(Protocol):
    """How the ranks of a ring reach each other."""

    rank: int

    def start(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> Callable[[], None]:
        """Begin to send and to receive contiguous tensors, given with the other side's rank; call the result to wait.

        Between two ranks, messages arrive in the order in which they were sent.
        """


class GroupExchange:
    """An :class:`Exchange` between the ranks of a process group. Collective: all ranks of the group create it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        # NCCL wants all ranks in a group's first operation; with nothing to send some would miss it.
        dist.barrier(group)

    def start(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> Callable[[], None]:
        """See :class:`Exchange`."""
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()
            operations.clear()  # what was sent had to live until here

        return wait


@dataclass(frozen=True)
class Ring:
    """One rank's part in attention over ranks: what it does, how it reaches the others, and which kernel computes."""

    plan: RankPlan
    exchange: Exchange
    backend: Backend
    scale: float


@dataclass(frozen=True)
class _Calls:
    """What every call of a plan computes: the causal one over own keys, and each step's dense ones."""

    own: Segments
    steps: tuple[tuple[Segments, ...], ...]


@lru_cache(maxsize=64)
def _calls(plan: RankPlan, scale: float, device: torch.device) -> _Calls:
    """All boundaries in one copy to the device."""
    dense = [bounds for step in plan.steps for call in step.calls for bounds in (call.query_bounds, call.key_bounds)]
    everything = [plan.bounds, *dense]
    flat = torch.tensor([x for bounds in everything for x in bounds], dtype=torch.int32).to(device)
    split = flat.split([len(bounds) for bounds in everything])
    documents = iter([Documents(cu, bounds) for cu, bounds in zip(split, everything, strict=True)])
    own = Segments.within(next(documents), scale)
    return _Calls(
        own,
        tuple(
            tuple(Segments(next(documents), next(documents), False, scale) for _ in step.calls) for step in plan.steps
        ),
    )


def ring_forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all tokens of their documents, wherever they are.

    ``q`` [rank's tokens, heads, head size], ``k``, ``v`` [rank's tokens, key/value heads, head size], in the plan's
    order. Returns ``out`` like q and ``lse`` [heads, rank's tokens], of the whole softmax. Collective: all ranks of
    the ring call it, with plans made from the same shards.
    """
    plan, backend = ring.plan, ring.backend
    calls = _calls(plan, ring.scale, q.device)
    flights = _KeysInFlight(k, v, plan, ring.exchange)
    out, lse = backend.forward(q, k, v, calls.own)
    dtype = out.dtype
    # Merging is in place, and a recomputation may still want the kernel's own results.
    out, lse = out.to(lse_dtype(q), copy=True), lse.clone()
    for index, step in enumerate(plan.steps):
        keys, values = flights.land(index)
        for call, segments in zip(step.calls, calls.steps[index], strict=True):
            rows, cols = slice(*call.queries), slice(*call.keys)
            block = backend.forward(q[rows], keys[cols], values[cols], segments)
            _merge(out[rows], lse[:, rows], *block)
    return out.to(dtype), lse


def ring_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dq, dk, dv)`` of :func:`ring_forward`, shaped as its inputs; ``out`` and ``lse`` are its results.

    Keys and values travel once more, and their gradients back. Collective: all ranks of the ring call it.
    """
    plan, exchange, backend = ring.plan, ring.exchange, ring.backend
    calls = _calls(plan, ring.scale, q.device)
    flights = _KeysInFlight(k, v, plan, exchange)
    accumulator = lse_dtype(q)
    gradients = backend.backward(dout, q, k, v, out, lse, calls.own)
    dq = gradients[0].to(accumulator)
    dkv = torch.stack([gradient.to(accumulator) for gradient in gradients[1:]], dim=1)
    returning: Callable[[], None] | None = None
    for index, step in enumerate(plan.steps):
        keys, values = flights.land(index)
        away = dkv.new_zeros(step.received, *dkv.shape[1:])
        for call, segments in zip(step.calls, calls.steps[index], strict=True):
            rows, cols = slice(*call.queries), slice(*call.keys)
            inputs = (dout[rows], q[rows], keys[cols], values[cols], out[rows], lse[:, rows].contiguous())
            block_q, block_k, block_v = backend.backward(*inputs, segments)
            dq[rows] += block_q
            away[cols, 0] += block_k
            away[cols, 1] += block_v
        if returning:
            returning()
        returning = _return_gradients(dkv, away, step.sent, step.to, step.source, exchange)
    if returning:
        returning()
    return dq.to(q.dtype), dkv[:, 0].to(k.dtype), dkv[:, 1].to(v.dtype)


class _KeysInFlight:
    """Keys and values of the next step travel while those of the current one are used."""

    def __init__(self, k: Tensor, v: Tensor, plan: RankPlan, exchange: Exchange) -> None:
        self._own, self._plan, self._exchange = (k, v), plan, exchange
        self._flying: list[tuple[Tensor, Callable[[], None]]] = []  # none or one
        self._start(0)

    def _start(self, index: int) -> None:
        if index == len(self._plan.steps):
            return
        step, (k, v) = self._plan.steps[index], self._own
        block = k.new_empty(2, step.received, *k.shape[1:])
        sends = [(step.to, torch.stack([_gather(x, step.sent) for x in (k, v)]))] if step.sent else []
        wait = self._exchange.start(sends, [(step.source, block)] if step.received else [])
        self._flying.append((block, wait))

    def land(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of step ``index``, [tokens received, heads, size] each; those of the next one take off."""
        block, wait = self._flying.pop()
        wait()
        self._start(index + 1)
        return block[0], block[1]


def _return_gradients(
    dkv: Tensor, away: Tensor, sent: tuple[Span, ...], to: int, source: int, exchange: Exchange
) -> Callable[[], None]:
    """Send gradients of another's keys home; waiting adds what came home to ``dkv``."""
    home = dkv.new_empty(sum(b - a for a, b in sent), *dkv.shape[1:])
    wait = exchange.start([(source, away)] if len(away) else [], [(to, home)] if len(home) else [])

    def finish() -> None:
        wait()
        at = 0
        for a, b in sent:
            dkv[a:b] += home[at : at + b - a]
            at += b - a

    return finish


def _gather(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    return torch.cat([x[a:b] for a, b in spans])


def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Add a part of a softmax in place: ``out`` [tokens, heads, size], ``lse`` [heads, tokens]."""
    total = torch.logaddexp(lse, block_lse)
    before, after = (weight.sub(total).exp_().t().unsqueeze(-1) for weight in (lse, block_lse))
    out.mul_(before).addcmul_(block.to(out.dtype), after)
    lse.copy_(total)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
    """:func:`ring_forward`, with :func:`ring_backward` as its gradient. Returns q's shape. Collective as they are."""
    return _RingAttention.apply(q, k, v, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        out, lse = ring_forward(q, k, v, ring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), (q, k, v, out, lse) = grads, ctx.saved_tensors
        return *ring_backward(dout.contiguous(), q, k, v, out, lse, ctx.ring), None
