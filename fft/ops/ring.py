"""Causal attention over packed documents whose tokens are spread over ranks (ring attention, arXiv:2310.01889).

What is computed and what travels is planned on the host, see :mod:`fft.parallel.ring_plan`. Keys and values of a step
are in flight while those of the step before are computed with; their gradients return while the next are computed.
Partial results are merged, and all gradients summed, in float32 and in the order of the steps, so that results do not
depend on timing. Queries never travel, and nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fft.ops.backends import Backend
from fft.ops.documents import Documents, Segments, lse_dtype
from fft.parallel.ring_calls import Band, Call, RankPlan, Span


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
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))  # in this order: see ``trade``
            for peer, tensor in messages
        ]
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()
            operations.clear()  # what was sent had to live until here

        return wait


class _Nobody:
    """The :class:`Exchange` of a ring of one rank."""

    rank = 0

    def start(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> Callable[[], None]:
        """There is nobody to wait for."""
        return lambda: None


NOBODY: Exchange = _Nobody()


@dataclass(frozen=True)
class Ring:
    """One rank's part in attention over ranks: what it does, how it reaches the others, and which kernel computes."""

    plan: RankPlan
    exchange: Exchange
    backend: Backend
    scale: float
    cap: float | None = None


@dataclass(frozen=True)
class _Calls:
    """What every call of a plan computes: the causal one over own keys, more of those, and each step's."""

    own: Segments
    near: tuple[Segments, ...]
    steps: tuple[tuple[Segments, ...], ...]


@lru_cache(maxsize=64)
def _calls(plan: RankPlan, scale: float, cap: float | None, device: torch.device) -> _Calls:
    """All boundaries in one copy to the device."""
    groups = [plan.near, *(step.calls for step in plan.steps)]
    others = [bounds for calls in groups for call in calls for bounds in (call.query_bounds, call.key_bounds)]
    everything = [plan.bounds, *others]
    flat = torch.tensor([x for bounds in everything for x in bounds], dtype=torch.int32).to(device)
    split = flat.split([len(bounds) for bounds in everything])
    documents = iter([Documents(cu, bounds) for cu, bounds in zip(split, everything, strict=True)])
    scores = scale, cap
    own = Segments.within(next(documents), *scores)
    near, *steps = (
        tuple(Segments(next(documents), next(documents), call.reverse, *scores) for call in calls) for calls in groups
    )
    return _Calls(own, near, tuple(steps))


def ring_forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all tokens of their documents, wherever they are.

    ``q`` [rank's tokens, heads, head size], ``k``, ``v`` [rank's tokens, key/value heads, head size], in the plan's
    order. Returns ``out`` like q and ``lse`` [heads, rank's tokens], of the whole softmax. Collective: all ranks of
    the ring call it, with plans made from the same shards.
    """
    plan, backend = ring.plan, ring.backend
    calls = _calls(plan, ring.scale, ring.cap, q.device)
    flights = _KeysInFlight(k, v, plan, ring.exchange)
    out, lse = backend.forward(q, k, v, calls.own)
    dtype = out.dtype
    # Merging is in place, and a recomputation may still want the kernel's own results.
    out, lse = out.to(lse_dtype(q), copy=True), lse.clone()

    def compute(todo: Sequence[Call | Band], segments: tuple[Segments, ...], keys: Tensor, values: Tensor) -> None:
        for call, seen in zip(todo, segments, strict=True):
            own, others, back = call.query_spans, call.key_spans, call.reverse
            asked, key, value = _taken(q, own, back), _taken(keys, others, back), _taken(values, others, back)
            block, block_lse = backend.forward(asked, key, value, seen)
            parts = zip(own, _parts(block, own, back), _parts(block_lse.t(), own, back), strict=True)
            for (a, b), part, part_lse in parts:
                _merge(out[a:b], lse[:, a:b], part, part_lse.t())

    compute(plan.near, calls.near, k, v)
    for index, step in enumerate(plan.steps):
        compute(step.calls, calls.steps[index], *flights.land(index))
    return out.to(dtype), lse


def ring_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dq, dk, dv)`` of :func:`ring_forward`, shaped as its inputs; ``out`` and ``lse`` are its results.

    Keys and values travel once more, and their gradients back. Collective: all ranks of the ring call it.
    """
    plan, exchange, backend = ring.plan, ring.exchange, ring.backend
    calls = _calls(plan, ring.scale, ring.cap, q.device)
    flights = _KeysInFlight(k, v, plan, exchange)
    accumulator = lse_dtype(q)
    gradients = backend.backward(dout, q, k, v, out, lse, calls.own)
    dq = gradients[0].to(accumulator)
    dkv = torch.stack([gradient.to(accumulator) for gradient in gradients[1:]], dim=1)
    returning: Callable[[], None] | None = None

    def compute(
        todo: Sequence[Call | Band], segments: tuple[Segments, ...], keys: Tensor, values: Tensor, sums: Tensor
    ) -> None:
        for call, seen in zip(todo, segments, strict=True):
            own, others, back = call.query_spans, call.key_spans, call.reverse
            grad, asked, result = (_taken(x, own, back) for x in (dout, q, out))
            key, value = (_taken(x, others, back) for x in (keys, values))
            whole = _taken(lse.t(), own, back).t().contiguous()
            block_q, block_k, block_v = backend.backward(grad, asked, key, value, result, whole, seen)
            for (a, b), part in zip(own, _parts(block_q, own, back), strict=True):
                dq[a:b] += part
            for which, block in enumerate((block_k, block_v)):
                for (a, b), part in zip(others, _parts(block, others, back), strict=True):
                    sums[a:b, which] += part

    compute(plan.near, calls.near, k, v, dkv)
    for index, step in enumerate(plan.steps):
        keys, values = flights.land(index)
        away = dkv.new_zeros(step.received, *dkv.shape[1:])
        compute(step.calls, calls.steps[index], keys, values, away)
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


def _taken(x: Tensor, spans: tuple[Span, ...], reverse: bool) -> Tensor:
    """Rows of ``x``, those of each span in reverse if asked; a view of one span."""
    rows = [x[a:b].flip(0) if reverse else x[a:b] for a, b in spans]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _parts(rows: Tensor, spans: tuple[Span, ...], reverse: bool) -> list[Tensor]:
    """What :func:`_taken` took, span by span, in the order of the spans' rows."""
    parts = rows.split([b - a for a, b in spans])
    return [part.flip(0) for part in parts] if reverse else list(parts)


def _gather(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    return torch.cat([x[a:b] for a, b in spans])


def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Add a part of a softmax in place: ``out`` [tokens, heads, size], ``lse`` [heads, tokens]."""
    total = torch.logaddexp(lse, block_lse)
    before, after = (weight.sub(total).exp_().t().unsqueeze(-1) for weight in (lse, block_lse))
    out.mul_(before).addcmul_(block.to(out.dtype), after)
    lse.copy_(total)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring, sinks: Tensor | None = None) -> Tensor:
    """:func:`ring_forward`, with :func:`ring_backward` as its gradient. Returns q's shape. Collective as they are.

    ``sinks`` [heads] are those of :class:`~fft.ops.documents.Softmax`.
    """
    return _RingAttention.apply(q, k, v, sinks, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring) -> Tensor:
        out, lse = with_sinks(*ring_forward(q, k, v, ring), sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), (q, k, v, out, lse, sinks) = grads, ctx.saved_tensors
        gradients = ring_backward(dout.contiguous(), q, k, v, out, lse, ctx.ring)
        return *gradients, gradient_of_sinks(dout, out, lse, sinks), None


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out`` [tokens, heads, size] and ``lse`` [heads, tokens] of a softmax to whose sum each head's sink was added.

    A sink is one more part of the softmax, without a value; so gradients of all else are a kernel's, given this.
    """
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weight = (lse - total).exp_().t().unsqueeze(-1)
    return (out * weight).to(out.dtype), total


def gradient_of_sinks(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Gradient of ``sinks``, given the results of :func:`with_sinks`."""
    if sinks is None:
        return None
    share = (sinks.to(lse.dtype)[:, None] - lse).exp_()
    through = (dout.to(lse.dtype) * out).sum(-1).t()
    return -(share * through).sum(-1).to(sinks.dtype)
