"""Saving a training state: how long training stands still, how long until it is on disk, memory, loading.

python -m benchmarks.checkpoint                    # 60 M parameters in bf16: some three minutes on 2 cores
python -m benchmarks.checkpoint --layers 48        # 220 M

Each method saves the same state of one process four times, and is timed at the last three (median): the first makes
buffers. `blocked` is until training may go on, `whole` until the checkpoint is complete. Ours are checksummed and
synced to the disk in that time; the others are left to the page cache, as their users have them. `held` is the
memory that saving adds to the process and its children, `peak` that of all, which is reached while it loads.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.measure import run_measured
from fft.console import format_table, say

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("none", "thread", "process", "deepspeed", "dcp", "dcp-async")
NAMES = {
    "none": "fft, none",
    "thread": "fft, thread",
    "process": "fft, process",
    "deepspeed": "DeepSpeed save_checkpoint",
    "dcp": "torch DCP save",
    "dcp-async": "torch DCP async_save",
}


def main() -> int:
    """Run every method in a process of its own and print the table."""
    args = _parse()
    if args.method:
        return measure(args.method, args.work, args.layers)
    work, rows, synchronous = args.work.resolve(), [], None
    work.mkdir(parents=True, exist_ok=True)
    for method in METHODS:
        say(f"{NAMES[method]} ...")
        command = [sys.executable, "-m", "benchmarks.checkpoint", "--method", method, "--work", work]
        cost = run_measured([*command, "--layers", args.layers], ROOT, os.environ, work / f"{method}.log")
        told = json.loads((work / f"{method}.json").read_text())
        synchronous = synchronous or told["blocked"]
        shares = told["blocked"] / synchronous, told["blocked"], told["whole"], told["load"]
        rows.append([NAMES[method], *shares, told["bytes"] / 2**20, told["held"] / 2**20, cost.peak_bytes / 2**20])
        shutil.rmtree(work / method)
    header = ("saver", "blocked / none", "blocked s", "whole s", "load s", "MB on disk", "held MB", "peak MB")
    print(f"{told['parameters'] / 1e6:.0f} M parameters, bf16, fp32 masters and moments; one process")
    print(format_table(header, rows))
    return 0


def measure(method: str, work: Path, layers: int) -> int:
    """Save and load by one method; leaves ``METHOD.json`` in ``work``."""
    import torch
    import torch.distributed as dist

    from fft.checkpoint import optimizer_state

    folder = work / method
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    engine, config = _trained_engine(layers)
    parameters = engine.parameters
    if method in ("none", "thread", "process"):
        save, load, close = _ours(method, folder, engine, parameters, config)
    elif method == "deepspeed":
        save, load, close = _deepspeed(folder, engine)
    else:
        training, _ = optimizer_state.gather(engine.optimizer, parameters, {}, engine.role)
        tensors = {**{name: p.detach() for name, p in parameters.items()}, **training}
        save, load, close = _dcp(folder, tensors, method == "dcp-async")
    blocked, whole, before, held = [], [], _resident(), 0
    for number in range(4):
        begun = time.perf_counter()
        wait = save(number)
        blocked.append(time.perf_counter() - begun)
        wait()
        whole.append(time.perf_counter() - begun)
        held = max(held, _resident() - before)
    begun = time.perf_counter()
    load(3)
    told = {
        "blocked": statistics.median(blocked[1:]),
        "whole": statistics.median(whole[1:]),
        "load": time.perf_counter() - begun,
        "held": held,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 4,
        "parameters": sum(p.numel() for p in parameters.values()),
    }
    close()
    (work / f"{method}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
    assert torch.isfinite(next(iter(parameters.values()))).all()
    return 0


def _resident() -> int:
    process = psutil.Process()
    return sum(part.memory_full_info().uss for part in (process, *process.children(recursive=True)))


def _trained_engine(layers: int) -> tuple:
    """An engine after one step, so that the optimizer has a state, and its model's config."""
    from benchmarks.engines import Workload, llama

    workload = Workload(llama(512, layers, 16_000), 64, 1, flags=("--dtype=bf16",))
    step, engine = workload.build()
    step()
    return engine, workload.config


def _ours(method: str, folder: Path, engine: object, parameters: dict, config: object) -> tuple[Callable, ...]:
    import torch.distributed as dist

    from fft.checkpoint import folder as checkpoints
    from fft.checkpoint import optimizer_state
    from fft.checkpoint.saver import Contents, RankShare, Saver
    from fft.checkpoint.stored_run import run_at
    from fft.weights import hf

    saver = Saver(Contents(run_at(folder), config, None, None, 1, 0, 0), method, dist.new_group(backend="gloo"))

    def save(number: int) -> Callable:
        saver.save(
            f"step-{number}",
            RankShare((parameters, 0), optimizer_state.gather(engine.optimizer, parameters, {}, engine.role)),
            {"step": number},
        )
        return saver.finish

    def load(number: int) -> None:
        checkpoint = folder / f"step-{number}"
        assert checkpoints.fault(checkpoint) is None
        reader = hf.WeightReader(checkpoint)
        for name, parameter in parameters.items():
            parameter.data.copy_(reader.read(name, parameter.shape))
        optimizer_state.restore(engine.optimizer, parameters, {}, checkpoint / checkpoints.TRAINING, 1)

    return save, load, saver.close


def _deepspeed(folder: Path, engine: object) -> tuple[Callable, ...]:
    def save(number: int) -> Callable:
        engine.deepspeed.save_checkpoint(folder, tag=f"step-{number}")
        return lambda: None

    return save, lambda number: engine.deepspeed.load_checkpoint(folder, tag=f"step-{number}"), lambda: None


def _dcp(folder: Path, tensors: dict, background: bool) -> tuple[Callable, ...]:
    import torch.distributed.checkpoint as dcp

    def save(number: int) -> Callable:
        if background:
            return dcp.async_save(tensors, checkpoint_id=folder / f"step-{number}").result
        dcp.save(tensors, checkpoint_id=folder / f"step-{number}")
        return lambda: None

    return save, lambda number: dcp.load(tensors, checkpoint_id=folder / f"step-{number}"), lambda: None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/fft-checkpoint-benchmark"), help="where to write")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers of the model")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
