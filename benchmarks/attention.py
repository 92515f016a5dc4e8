"""Attention over ranks: what a plan saves, and what it costs. Prints the tables of docs/attention.md.

    python -m benchmarks.attention plans              # any machine: balance, traffic and calls, simulated
    python -m benchmarks.attention wall --ranks 2     # CPU: ring, all-gather and one process, seconds
    python -m benchmarks.device --part attention ...  # a device: its kernels, and all ranks' one after another

Peers: `contiguous` and `zigzag` cut the row (not its documents) and pass all keys and values around a ring;
`all-gather` (Llama 3, arXiv:2407.21783) takes the zigzag and gathers all keys and values first; `ulysses` exchanges
tokens for heads.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from fft.ops.backends.choice import choose
from fft.ops.documents import Documents, Segments
from fft.ops.ring import GroupExchange, Ring, ring_forward
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
    for name, run in (("wall", wall), ("wall-rank", wall_rank)):
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("--documents", choices=DOCUMENTS, default="log-normal, median 2k")
        command.add_argument("--tokens", type=int, default=1 << 14)
        command.add_argument("--heads", type=int, default=8)
        command.add_argument("--kv", type=int, default=2)
        command.add_argument("--size", type=int, default=64)
        command.add_argument("--ranks", type=int, default=2)
        command.add_argument("--repeats", type=int, default=3)
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
