"""Attention over ranks: what a plan saves, and what it costs. Prints the tables of docs/attention.md.

    python -m benchmarks.attention plans              # any machine: balance, traffic and calls, simulated
    python -m benchmarks.attention wall --ranks 2     # CPU: ring, all-gather and one process, seconds
    python -m benchmarks.attention emulate --ranks 8  # one GPU (or CPU): all ranks' kernels one after another
    python -m benchmarks.attention backends           # one GPU (or CPU): all kernels that run here, and PyTorch's SDPA

Peers: `contiguous` and `zigzag` cut the row (not its documents) and pass all keys and values around a ring;
`all-gather` (Llama 3, arXiv:2407.21783) takes the zigzag and gathers all keys and values first; `ulysses` exchanges
tokens for heads.
"""

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from fft.errors import UserError
from fft.ops.backends.choice import KERNELS, choose, kernel_name
from fft.ops.documents import Documents, Segments
from fft.ops.ring import GroupExchange, Ring, ring_backward, ring_forward
from fft.parallel.groups import own_group
from fft.parallel.ring_plan import RankPlan, TokenShards, plan_rank, plan_shards, shards_of

#: Llama-3-8B: query heads, key/value heads, head size.
HEADS, KV_HEADS, SIZE = 32, 8, 128

DOCUMENTS = {
    "log-normal, median 2k": lambda rng: rng.lognormal(np.log(2000), 1.3),
    "uniform to 8k": lambda rng: rng.uniform(1, 8192),
    "chats, median 300": lambda rng: rng.lognormal(np.log(300), 0.8),
    "one document": lambda rng: np.inf,
}


def bounds_of(draw: Callable, tokens: int) -> tuple[int, ...]:
    """Boundaries of documents that fill a row, the last one cut off."""
    rng, bounds = np.random.default_rng(0), [0]
    while bounds[-1] < tokens:
        bounds.append(int(min(tokens, bounds[-1] + 1 + draw(rng))))
    return tuple(bounds)


def plans(options: argparse.Namespace) -> None:
    """Simulated forward passes. Efficiency: ideal time (equal parts at the kernel's rate) over the slowest rank's."""
    print(
        f"kernel {options.tflops:g} TFLOP/s and {options.launch_us:g} us a call, link {options.gbytes:g} GB/s a rank, "
        f"{HEADS}/{KV_HEADS} heads of {SIZE}, bf16\n\n"
        "| documents | tokens | ranks | scheme | busiest/mean | MB received | calls | efficiency |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, draw in DOCUMENTS.items():
        for tokens in options.tokens:
            bounds = bounds_of(draw, tokens)
            for ranks in options.ranks:
                for scheme, row in schemes(bounds, ranks, options).items():
                    balance, received, calls, efficiency = row
                    print(
                        f"| {name} | {tokens:,} | {ranks} | {scheme} | {balance:.2f} | {received / 1e6:,.1f} | {calls} "
                        f"| {efficiency:.0%} |"
                    )


def schemes(bounds: tuple[int, ...], ranks: int, options: argparse.Namespace) -> dict[str, tuple]:
    """(busiest rank over mean, most bytes a rank receives, most calls, efficiency) of each scheme."""
    contiguous = shards_of(bounds, range(ranks))
    zigzag = shards_of(bounds, [*range(ranks), *reversed(range(ranks))])
    ours = plan_shards(bounds, ranks)
    ideal = seconds(sum(ours.areas) / ranks, 0, options)
    token = 2 * KV_HEADS * SIZE * 2  # bytes of a token's key and value
    everything = token * bounds[-1] * (ranks - 1) / ranks
    rows = {}
    for name, shards in (("contiguous", contiguous), ("zigzag", zigzag), ("plan", ours)):
        every = [plan_rank(shards, rank) for rank in range(ranks)]
        block = None if name == "plan" else token * bounds[-1] / ranks
        slowest = max(
            overlapped(plan, area, token, block, options) for plan, area in zip(every, shards.areas, strict=True)
        )
        received = token * max(sum(s.received for s in p.steps) for p in every) if block is None else everything
        rows[name] = (shards.imbalance, received, max(plan.calls for plan in every), ideal / slowest)
    gathered = max(seconds(area, 2, options) for area in zigzag.areas) + everything / options.gbytes / 1e9
    rows["all-gather"] = (zigzag.imbalance, everything, 2, ideal / gathered)
    if KV_HEADS % ranks == 0:
        exchanged = 2 * (2 * HEADS + 2 * KV_HEADS) * SIZE * bounds[-1] / ranks * (ranks - 1) / ranks
        whole = seconds(sum(ours.areas) / ranks, 1, options) + exchanged / options.gbytes / 1e9
        rows["ulysses"] = (1.0, exchanged, 1, ideal / whole)
    return rows


def seconds(area: float, calls: int, options: argparse.Namespace) -> float:
    """Time of a forward kernel over ``area`` pairs of tokens: two products of a head's size each."""
    return area * 4 * HEADS * SIZE / options.tflops / 1e12 + calls * options.launch_us / 1e6


def overlapped(plan: RankPlan, area: int, token: int, block: float | None, options: argparse.Namespace) -> float:
    """Time of a rank whose next keys fly while it computes; ``block`` bytes a step where all of them travel."""
    dense = [sum(call.area for call in step.calls) for step in plan.steps]
    work = [seconds(area - sum(dense), 1, options)]
    work += [seconds(part, len(step.calls), options) for part, step in zip(dense, plan.steps, strict=True)]
    flights = [(token * step.received if block is None else block) / options.gbytes / 1e9 for step in plan.steps]
    return sum(max(pair) for pair in zip(work, [*flights, 0.0], strict=True))


def random_inputs(options: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the output's gradient for the whole row."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(options.tokens, heads, options.size) for heads in (options.heads, options.kv, options.kv, options.heads)]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def best_of(work: Callable[[], object], repeats: int, finish: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of some repeats, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        finish()
        begin = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


class Gathered:
    """An exchange that has everything already: blocks come out of all ranks' keys and values, in the plan's order."""

    def __init__(self, rank: int, shards: TokenShards, keys: torch.Tensor) -> None:
        self.rank, self._shards, self._keys, self._step = rank, shards, keys, 0

    def start(self, sends: list, receives: list) -> Callable[[], None]:
        """Copy the rows another rank would have sent."""
        step = plan_rank(self._shards, self.rank).steps[self._step]
        self._step += 1
        if receives:
            (sent,) = (s.sent for s in plan_rank(self._shards, step.source).steps if s.to == self.rank)
            at = sum(plan_rank(self._shards, rank).tokens for rank in range(step.source))
            receives[0][1].copy_(torch.cat([self._keys[:, at + a : at + b] for a, b in sent], dim=1))
        return lambda: None


def wall_rank(options: argparse.Namespace) -> None:
    """One rank of :func:`wall`: prints seconds, forward, slowest rank."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v, _ = random_inputs(options, torch.device("cpu"))
    backend, scale = choose(q.device, q.dtype), options.size**-0.5
    shards = plan_shards(bounds_of(DOCUMENTS[options.documents], options.tokens), ranks)
    plan, tokens = plan_rank(shards, rank), torch.from_numpy(shards.tokens(rank))
    q, k, v = (x[tokens] for x in (q, k, v))
    ring = Ring(plan, GroupExchange(own_group([list(range(ranks))])), backend, scale)

    def gather() -> None:
        both = torch.stack((k, v))
        shares = [both.new_empty(2, plan_rank(shards, r).tokens, *both.shape[2:]) for r in range(ranks)]
        dist.all_gather(shares, both)
        ring_forward(q, k, v, Ring(plan, Gathered(rank, shards, torch.cat(shares, 1)), backend, scale))

    for name, work in (
        ("ring", lambda: ring_forward(q, k, v, ring)),
        ("all-gather", gather),
    ):
        spent = torch.tensor(best_of(work, options.repeats, dist.barrier))
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"{name} {spent.item()}", flush=True)
    dist.destroy_process_group()


def wall(options: argparse.Namespace) -> None:
    """Forward seconds on this machine: one process with a thread for each rank, and ranks with one thread each."""
    torch.set_num_threads(options.ranks)
    q, k, v, _ = random_inputs(options, torch.device("cpu"))
    documents = Documents.of(bounds_of(DOCUMENTS[options.documents], options.tokens))
    backend, segments = choose(q.device, q.dtype), Segments.within(documents, options.size**-0.5)
    whole = best_of(lambda: backend.forward(q, k, v, segments), options.repeats)
    flags = [f"--{name}={getattr(options, name)}" for name in ("documents", "tokens", "heads", "kv", "size", "repeats")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.attention", "wall-rank", *flags], capture_output=True, text=True, check=True
    )
    print("| scheme | seconds | of one process |\n| --- | --- | --- |")
    print(f"| one process, {options.ranks} threads | {whole:.3f} | 1.00 |")
    for line in done.stdout.splitlines():
        name, spent = line.split()
        print(f"| {name}, {options.ranks} ranks | {float(spent):.3f} | {whole / float(spent):.2f} |")


class Nobody:
    """An exchange without others, for timing: what would arrive is zeros."""

    rank = 0

    def start(self, sends: list, receives: list) -> Callable[[], None]:
        """Fill the buffers."""
        for _, buffer in receives:
            buffer.zero_()
        return lambda: None


def emulate(options: argparse.Namespace) -> None:
    """All ranks' kernels, merges and copies on one device, one rank after another, against one call over the row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    q, k, v, dout = random_inputs(options, device)
    backend, scale = choose(device, q.dtype, options.attention, options.size), options.size**-0.5
    bounds = bounds_of(DOCUMENTS[options.documents], options.tokens)
    segments, shards = Segments.within(Documents.of(bounds, device), scale), plan_shards(bounds, options.ranks)

    def one_call() -> None:
        out, lse = backend.forward(q, k, v, segments)
        backend.backward(dout, q, k, v, out, lse, segments)

    tensors = [
        [x[torch.from_numpy(shards.tokens(r)).to(device)] for x in (q, k, v, dout)] for r in range(options.ranks)
    ]
    whole = best_of(one_call, options.repeats, finish)
    rings = [Ring(plan_rank(shards, rank), Nobody(), backend, scale) for rank in range(options.ranks)]
    parts = [
        best_of(functools.partial(one_rank, ring, shard), options.repeats, finish)
        for ring, shard in zip(rings, tensors, strict=True)
    ]
    flops = sum(shards.areas) * 4 * options.heads * options.size * 3.5  # backward: five products for forward's two
    print(f"kernel {kernel_name(backend)}\n\n| scheme | seconds | TFLOP/s | of one call |\n| --- | --- | --- | --- |")
    for name, spent in (("one call", whole), ("all ranks", sum(parts)), ("ranks x slowest", max(parts) * len(parts))):
        print(f"| {name} | {spent:.4f} | {flops / spent / 1e12:.2f} | {whole / spent:.0%} |")


def one_rank(ring: Ring, shard: list[torch.Tensor]) -> None:
    """Forward and backward of a rank."""
    q, k, v, dout = shard
    out, lse = ring_forward(q, k, v, ring)
    ring_backward(dout, q, k, v, out, lse, ring)


def backends(options: argparse.Namespace) -> None:
    """Forward and backward of every kernel that runs here, on rows of documents of equal length, beside SDPA."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    scale = options.size**-0.5
    print("| document | kernel | forward ms | backward ms | TFLOP/s |\n| --- | --- | --- | --- | --- |")
    for length in options.lengths:
        options.tokens = length * max(1, options.row // length)
        q, k, v, dout = random_inputs(options, device)
        bounds = tuple(range(0, options.tokens + 1, length))
        segments = Segments.within(Documents.of(bounds, device), scale)
        flops = sum(shards_of(bounds, [0]).areas) * 4 * options.heads * options.size * 3.5
        timed: dict[str, tuple[Callable, Callable]] = {}
        for name, kernel in KERNELS.items():
            if not kernel.fits(device, q.dtype) or not kernel.is_installed():
                continue
            try:
                backend = choose(device, q.dtype, name, options.size)
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            out, lse = backend.forward(q, k, v, segments)
            timed[name] = (
                functools.partial(backend.forward, q, k, v, segments),
                functools.partial(backend.backward, dout, q, k, v, out, lse, segments),
            )
        timed["PyTorch's SDPA"] = sdpa(q, k, v, dout, length, scale)
        for name, (forward, backward) in timed.items():
            spent = [best_of(work, options.repeats, finish) for work in (forward, backward)]
            times = " | ".join(f"{1000 * x:.2f}" for x in spent)
            print(
                f"| {length:,} x {len(bounds) - 1} | {name} | {times} | {flops / sum(spent) / 1e12:.2f} |", flush=True
            )


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, length: int, scale: float
) -> tuple[Callable, Callable]:
    """Forward and backward of ``scaled_dot_product_attention`` on a batch of documents of one length."""
    queries, keys, values, grad = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v, dout))
    queries, keys, values = leaves = [x.detach().requires_grad_() for x in (queries, keys, values)]

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    out = forward()
    return forward, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def main() -> None:
    """Parse the command line and run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("plans", help=plans.__doc__)
    table.add_argument("--tokens", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20])
    table.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 64])
    table.add_argument("--tflops", type=float, default=500, help="the kernel's rate (default: an H100's, about)")
    table.add_argument("--launch_us", type=float, default=10, help="cost of a call besides its work")
    table.add_argument("--gbytes", type=float, default=50, help="a rank's link, GB/s (default: 400 Gb/s)")
    table.set_defaults(run=plans)
    for name, run in (("wall", wall), ("wall-rank", wall_rank), ("emulate", emulate)):
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("--documents", choices=DOCUMENTS, default="log-normal, median 2k")
        command.add_argument("--tokens", type=int, default=1 << 14)
        command.add_argument("--heads", type=int, default=8)
        command.add_argument("--kv", type=int, default=2)
        command.add_argument("--size", type=int, default=64)
        command.add_argument("--ranks", type=int, default=2)
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--attention", choices=("auto", *KERNELS), default="auto", help="kernel to emulate with")
        command.set_defaults(run=run)
    side = commands.add_parser("backends", help=backends.__doc__)
    side.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of a document")
    side.add_argument("--row", type=int, default=32768, help="tokens of a row, if documents are shorter")
    for name, default in (("heads", 8), ("kv", 2), ("size", 64), ("repeats", 3)):
        side.add_argument(f"--{name}", type=int, default=default)
    side.set_defaults(run=backends)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
