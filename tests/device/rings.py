"""Attention over whole rows, and over rows whose tokens are spread over ranks that are threads of one process."""

import itertools
import queue
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch

from fft.ops.documents import Documents, Segments
from fft.ops.ring import Ring, ring_backward, ring_forward
from fft.parallel.window_plan import plan_attention


class ThreadExchange:
    """Messages through queues, arriving as late as allowed: a buffer read before waiting holds no number."""

    def __init__(self, rank, mail):
        self.rank, self._mail = rank, mail

    def start(self, sends, receives):
        for peer, tensor in sends:
            self._mail[self.rank, peer].put(tensor.clone())
        for _, buffer in receives:
            buffer.fill_(float("nan"))

        def wait():
            for peer, buffer in receives:
                buffer.copy_(self._mail[peer, self.rank].get(timeout=30))

        return wait


def emulate(shards, inputs, backend, scale, window=None, cap=None):
    """``(out, lse, dq, dk, dv)`` of the whole row, each rank's part computed by a thread of its own."""
    q, k, v, dout = inputs
    lock, boxes = threading.Lock(), defaultdict(queue.Queue)

    class Mail:
        def __getitem__(self, key):
            with lock:
                return boxes[key]

    def run(rank):
        tokens = torch.from_numpy(shards.tokens(rank))
        mine = [x[tokens] for x in (q, k, v)]
        ring = Ring(plan_attention(shards, rank, window), ThreadExchange(rank, Mail()), backend, scale, cap)
        out, lse = ring_forward(*mine, ring)
        return tokens, out, lse, *ring_backward(dout[tokens], *mine, out, lse, ring)

    with ThreadPoolExecutor(shards.ranks) as pool:
        parts = list(pool.map(run, range(shards.ranks)))
    tokens, outs, lses, *grads = zip(*parts, strict=True)
    order = torch.cat(tokens).argsort()
    assert all(box.empty() for box in boxes.values())
    return torch.cat(outs)[order], torch.cat(lses, 1)[:, order], *(torch.cat(grad)[order] for grad in grads)


def whole(documents, inputs, backend, scale):
    """The same of one call."""
    q, k, v, dout = inputs
    segments = Segments.within(documents, scale)
    out, lse = backend.forward(q, k, v, segments)
    return out, lse, *backend.backward(dout, q, k, v, out, lse, segments)


def tensors(total, heads, kv_heads, size, dtype=torch.float64, seed=0):
    """Random q, k, v and gradient of the output, the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total, n, size) for n in (heads, kv_heads, kv_heads, heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def documents_of(lengths, device="cpu") -> Documents:
    """Documents of these lengths, one after another."""
    return Documents.of(tuple(itertools.accumulate(lengths, initial=0)), device)
