"""A step against a plain PyTorch loop, ways to recompute, the loss against naive logits, the bubble by its formula, and
what a step asks of a device, counted.

python -m benchmarks.step step        # trainer and loop in one process, step about step: some three minutes
python -m benchmarks.step recompute   # the trainer with all activations kept, some of them, and none
python -m benchmarks.step loss        # peak memory and time of the loss, each way in a process of its own
python -m benchmarks.step bytes       # launches, bytes and host reads of a step's parts, and the time they should take
python -m benchmarks.step bubble      # stages that sleep instead of computing: cores are not what is measured

The plain loop is transformers' own model with its own attention, torch's cross-entropy, clipping and AdamW, on rows of
one document, so that both do the same work; fp32 on a CPU, bf16 on a GPU (the loop: fp32 weights, autocast).
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device.machine import unlaunched
from fft.console import format_table, say
from fft.planning.partition import pipeline_bubble

if TYPE_CHECKING:
    from benchmarks.engines import Workload
    from fft.parallel.mesh import MeshSizes

ROOT = Path(__file__).resolve().parent.parent
#: Seconds that a decoder layer's forward takes where it sleeps; its backward takes twice that.
_SLEEP = 0.05
_SLEEPERS = 8
#: Schedules and how many of the layers that sleep each stage has. Not DualPipeV over four: over gloo its ranks wait for
#: each other for ever (DeepSpeed 0.19.8).
_PIPELINES = (
    ("1F1B", (4, 4)),
    ("DualPipeV", (4, 4)),
    ("1F1B", (2, 2, 2, 2)),
    ("1F1B", (2, 6)),
    ("1F1B", (1, 2, 2, 3)),
    ("1F1B", (3, 2, 2, 1)),
)
#: What is compared: the trainer with these flags, or a plain loop, its AdamW fused (True) or as it comes; and the peer.
WAYS = {
    "step": (
        {"fft": (), "fft --zero_stage 1": ("--zero_stage=1",), "plain PyTorch": False, "plain, fused AdamW": True},
        "plain PyTorch",
    ),
    "recompute": (
        {
            "all kept": (),
            "--checkpoint_grad_selective": ("--checkpoint_grad_selective",),
            "--checkpoint_grad_interval 1": ("--checkpoint_grad_interval=1",),
        },
        "all kept",
    ),
}


def main() -> int:
    """Run one of them."""
    args = _parse()
    if args.role:
        roles = {"step-memory": step_memory, "loss": loss_peak, "bubble": bubble_of, "counts": counts_of}
        told = roles[args.role](args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(told))
        return 0
    if args.what in WAYS:
        compare(args, *WAYS[args.what])
    else:
        {"loss": compare_losses, "bubble": compare_bubbles, "bytes": count_bytes}[args.what](args)
    return 0


def compare(args: argparse.Namespace, ways: dict[str, tuple[str, ...] | bool], peer: str) -> None:
    """Print seconds a step and peak memory of each of ``ways``, and how its time compares with that of ``peer``."""
    import torch.distributed as dist

    import fft.training.engine

    fft.training.engine.init_distributed()
    steps = {name: _step(args, way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.steps + 2):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if number >= 2:
                seconds[name].append(time.perf_counter() - begun)
    dist.destroy_process_group()
    rows = []
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, seconds[peer], strict=True)]
        told = _in_own_process("--role", "step-memory", "--way", json.dumps(ways[name]), *_sizes(args))
        rate = args.micro_batches * args.tokens / statistics.median(times)
        rows.append([name, statistics.median(times), statistics.median(ratios), rate, told["peak"] / 2**20])
    print(f"{args.layers} layers of {args.hidden}, {args.micro_batches} micro-batches of {args.tokens} tokens")
    print(format_table(("", "s/step", f"of {peer}", "tokens/s", "peak MB"), rows))


def step_memory(args: argparse.Namespace) -> dict:
    """What two steps add to a process's memory, the model included."""
    import fft.training.engine

    fft.training.engine.init_distributed()
    before = peak_memory()
    step = _step(args, json.loads(args.way))
    for _ in range(2):
        step()
    return {"peak": peak_memory() - before}


def compare_losses(args: argparse.Namespace) -> None:
    """Print time and peak memory of the loss's forward and backward, fused and naive."""
    rows = []
    for way in ("fused", "naive"):
        told = _in_own_process("--role", "loss", "--way", way, *_sizes(args))
        rows.append([way, told["seconds"], told["peak"] / 2**20])
    print(f"{args.tokens} tokens of {args.hidden}, vocabulary {args.vocabulary}, fp32")
    print(format_table(("loss", "s", "peak MB"), rows))


def loss_peak(args: argparse.Namespace) -> dict:
    """Seconds and added peak memory of one way to get from hidden states to gradients."""
    import torch

    from fft.ops.cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    weight = torch.randn(args.vocabulary, args.hidden, requires_grad=True)
    labels = torch.randint(args.vocabulary, (args.tokens,))
    before, begun = peak_memory(), time.perf_counter()
    if args.way == "fused":
        loss = linear_cross_entropy(hidden, weight, labels)
    else:
        loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    loss.backward()
    return {"seconds": time.perf_counter() - begun, "peak": peak_memory() - before}


def count_bytes(_: argparse.Namespace) -> None:
    """Print what the parts of a micro-batch of Llama-3-8B launch and move, and the instructions of a small run."""
    from benchmarks import step_costs

    print(step_costs.table(step_costs.all_parts()))
    port = str(random.SystemRandom().randint(20000, 50000))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
    print(step_costs.instructions_table(_in_own_process("--role", "counts", launcher=launcher)))


def counts_of(_: argparse.Namespace) -> list[dict]:
    """Launches, bytes and reads of every rank's instructions in a small run of as many stages as there are ranks."""
    from benchmarks import step_costs

    return step_costs.run_counts()


def compare_bubbles(args: argparse.Namespace) -> None:
    """Print the share of a step that stages wait, measured and as 1F1B played through has it."""
    rows = []
    for (way, sizes), micro_batches in itertools.product(_PIPELINES, (4, 8, 16)):
        say(f"{way}, stages of {sizes} layers, {micro_batches} micro-batches ...")
        port = str(random.SystemRandom().randint(20000, 50000))
        stages, text = len(sizes), ",".join(map(str, sizes))
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(stages), "--master_port", port)
        flags = ("--role", "bubble", "--way", way, "--stages", text, "--micro_batches", str(micro_batches))
        told = _in_own_process(*flags, launcher=launcher)
        ideal = micro_batches * 3 * _SLEEP * _SLEEPERS / stages
        measured = 1 - ideal / told["seconds"]
        expected = pipeline_bubble(stages, micro_batches, sizes, [2 * layers for layers in sizes])
        rows.append([way, text, micro_batches, told["seconds"], measured, expected])
    print(format_table(("", "layers", "micro-batches", "s/step", "bubble measured", "1F1B predicted"), rows))


def bubble_of(args: argparse.Namespace) -> dict:
    """Seconds of a step whose decoder layers sleep."""
    import torch
    import torch.distributed as dist

    import fft.training.engine

    fft.training.engine.init_distributed()
    sizes = [int(layers) for layers in args.stages.split(",")]
    args.layers, args.hidden, args.vocabulary, args.tokens = _SLEEPERS, 32, 64, 32
    bounds = ",".join(map(str, _with_ends(sizes)))
    if args.way == "DualPipeV":
        fft.training.engine.StagedModel = _dual_pipe(_with_ends([_SLEEPERS // (2 * len(sizes))] * (2 * len(sizes))))
    step, engine = _workload(args, "--pipe_parallel_size", str(len(sizes)), "--partition_method", bounds).build()
    for layer in engine.deepspeed.module.modules():
        if type(layer).__name__ == "DecoderLayer":
            layer.register_forward_pre_hook(lambda *_: time.sleep(_SLEEP))
            layer.module.register_full_backward_hook(lambda *_: time.sleep(2 * _SLEEP))
    seconds = []
    for _ in range(4):
        dist.barrier()
        begun = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - begun)
    assert torch.isfinite(engine.deepspeed.agg_train_loss)
    return {"seconds": statistics.median(seconds[1:])}


def _with_ends(sizes: Sequence[int]) -> list[int]:
    """Layers of each stage, with the embedding in the first and norm and head in the last."""
    return [sizes[0] + 1, *sizes[1:-1], sizes[-1] + 2]


def _dual_pipe(sizes: list[int]) -> type:
    """DeepSpeed's DualPipeV with so many layers in each of its stages, two of which a rank has."""
    from deepspeed.pipe import DualPipeVModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class DualPipe(DualPipeVModule):
        def __init__(self, layers: list, _: list[int], mesh: "MeshSizes", **options: object) -> None:
            super().__init__(
                layers, topology=PipeModelDataParallelTopology(mesh.pipe, mesh.tensor, mesh.data), **options
            )

        def _partition_layers(self, method: str = "") -> None:
            self.num_stages = len(sizes)
            self.parts = list(itertools.accumulate(sizes, initial=0))
            stage = self._topo.get_coord(self.global_rank).pipe
            self.phase_bounds = [tuple(self.parts[i : i + 2]) for i in (stage, len(sizes) - 1 - stage)]
            self._set_bounds(*self.phase_bounds[0])

    return DualPipe


def _step(args: argparse.Namespace, way: tuple[str, ...] | bool) -> Callable[[], object]:
    return _plain(args, way) if isinstance(way, bool) else _workload(args, *way).build()[0]


def _workload(args: argparse.Namespace, *flags: str) -> "Workload":
    from benchmarks.engines import Workload, llama

    config = llama(args.hidden, args.layers, args.vocabulary)
    return Workload(config, args.tokens, args.micro_batches, flags=flags)


def _plain(args: argparse.Namespace, fused: bool) -> Callable[[], None]:
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    workload = _workload(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(workload.config, dtype=torch.float32, attn_implementation="sdpa").to(
        device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)
    batches = [torch.from_numpy(batch.input_ids[0]).long().to(device) for batch in workload.batches()]
    precision = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def step() -> None:
        for ids in batches:
            with precision:
                logits = model(ids[None]).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1))
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes: of the device where there is one, else resident."""
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        return accelerator.max_memory_allocated()
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def _sizes(args: argparse.Namespace) -> list[str]:
    names = ("tokens", "hidden", "layers", "vocabulary", "micro_batches")
    return [word for name in names for word in (f"--{name}", str(getattr(args, name)))]


def _in_own_process(*flags: str, launcher: tuple[str, ...] = ()) -> Any:
    command = [sys.executable, *launcher, "-m", "benchmarks.step", "-", *flags]
    done = subprocess.run(command, cwd=ROOT, env=unlaunched(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=(*WAYS, "loss", "bubble", "bytes", "-"), metavar="step|recompute|loss|bubble|bytes"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=2, help="of a step")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the vocabulary")
    parser.add_argument("--steps", type=int, default=8, help="steps counted, after two that are not")
    parser.add_argument("--role", choices=("step-memory", "loss", "bubble", "counts"), help=argparse.SUPPRESS)
    parser.add_argument("--stages", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
