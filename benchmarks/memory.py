"""A rank's memory as the dry run predicts it, against what the rank of a real launch held at most.

python -m benchmarks.memory           # eighteen configurations on this machine's device, some ten minutes on two cores

Measured is, on an accelerator, its allocator's peak; on a CPU the largest resident size less that before the model was
built and what libraries were read in meanwhile, with malloc told to give freed memory back.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.engines import Workload, join, llama, qwen2_vl, with_engine
from benchmarks.step import ROOT, peak_memory
from fft.console import format_table, say
from fft.training.engine import StageEngine

#: Sizes by which weights and activations both matter; micro-batches of 1,024 tokens.
_SIZES = {"tokens": 1024, "hidden": 512, "layers": 8, "vocabulary": 16384, "micro_batches": 2}
_PARTS = ("weights", "optimizer", "activations", "loss", "step", "total", "peak")
#: Stages, type, every how many layers to recompute, and what is trained, where.
_CONFIGURATIONS = (
    (1, "fp32", 0, ""),
    (1, "bf16", 0, ""),
    (2, "fp32", 0, ""),
    (2, "fp32", 1, ""),
    (2, "bf16", 2, ""),
    (1, "fp32", 0, "--lora_dim=16"),
    (2, "bf16", 0, "--lora_dim=16"),
    (2, "fp32", 0, r"--freeze=embed_tokens,layers\.[0-3]\."),
    (1, "fp32", 0, "--freeze=lm_head,embed_tokens"),
    (1, "bf16", 0, "--offload_optimizer"),
    (1, "fp32", 0, "--offload_optimizer"),
    (2, "fp32", 0, "--partition_method=3,8"),
    # With images: a tower in stages with the decoder, in stages of its own, shared by all.
    (1, "fp32", 0, "--encoder_pipe_parallel_size=-1"),
    (2, "fp32", 0, "--encoder_pipe_parallel_size=1"),
    (2, "bf16", 1, "--encoder_pipe_parallel_size=1"),
    (1, "bf16", 0, "--encoder_pipe_parallel_size=0"),
    (2, "fp32", 0, "--encoder_pipe_parallel_size=0"),
    (2, "fp32", 1, "--encoder_pipe_parallel_size=0"),
)
#: Patches of each image of a micro-batch, of which a tower of so many blocks makes tokens.
_PATCHES, _TOWER = (512, 1024, 256, 768), 6


def main() -> int:
    """Launch each configuration, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many configurations")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        told = measure(_workload(*json.loads(args.rank_of)))
        (args.into / os.environ["RANK"]).write_text(json.dumps(told))
        return 0
    rows = []
    for configuration in _CONFIGURATIONS[args.skip :]:
        pipe, dtype, interval, more = configuration
        say(f"pipe {pipe}, {dtype}, recomputing every {interval} {more} ...")
        for stage, told in enumerate(_launch(configuration)):
            parts = [told[name] / 1e6 for name in _PARTS]
            rows.append([*configuration, stage, *parts, told["total"] / told["peak"]])
    print(", ".join(f"{name} {size}" for name, size in _SIZES.items()))
    heads = ("pipe", "dtype", "recompute", "flags", "stage", "weights+grads", *_PARTS[1:5])
    print(format_table((*heads, "predicted MB", "measured MB", "ratio"), rows))
    return 0


def measure(workload: Workload) -> dict:
    """Bytes of this rank, predicted by kind and measured, in two steps. Collective."""
    import deepspeed
    import psutil

    join()
    # Torch's compiler, which DeepSpeed imports as it makes an optimizer of ZeRO's: some 45 MB, not the model's.
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    layout = workload.plan()[2]
    accelerator, host = deepspeed.get_accelerator(), deepspeed.get_accelerator().device_name() == "cpu"
    before = psutil.Process().memory_info() if host else accelerator.memory_allocated()
    if host:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the largest size so far
    else:
        accelerator.reset_peak_memory_stats()

    def peak(step: Callable[[], float], engine: StageEngine) -> tuple[int, int]:
        for _ in range(2):
            step()
        # Pages of libraries and of the communication library's shared buffers, which only come, are not the model's.
        base = before.rss + psutil.Process().memory_info().shared - before.shared if host else before
        return engine.role.stage, peak_memory() - base

    stage, most = with_engine(workload, peak)
    memory = layout.memory[stage]
    return {**vars(memory), "total": memory.total, "peak": most}


def _workload(pipe: int, dtype: str, interval: int, more: str) -> Workload:
    sizes = (f"--pipe_parallel_size={pipe}", f"--dtype={dtype}", f"--checkpoint_grad_interval={interval}")
    flags = (*sizes, *more.split())
    if "encoder" in more:
        config, rules = qwen2_vl(_SIZES["hidden"], _SIZES["layers"] // 2, _SIZES["vocabulary"], _TOWER)
        return Workload(config, _SIZES["tokens"], _SIZES["micro_batches"], flags=flags, images=rules, patches=_PATCHES)
    config = llama(_SIZES["hidden"], _SIZES["layers"], _SIZES["vocabulary"])
    return Workload(config, _SIZES["tokens"], _SIZES["micro_batches"], flags=flags)


def _launch(configuration: tuple[int, str, int, str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={configuration[0]}")
        flags = ("--rank_of", json.dumps(configuration), "--into", folder)
        command = [sys.executable, *launcher, "-m", "benchmarks.memory", *flags]
        # Blocks of 64 KiB and more go back to the system when they are freed.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(configuration[0])]


if __name__ == "__main__":
    sys.exit(main())
