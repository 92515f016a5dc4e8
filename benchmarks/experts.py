"""Experts over ranks against experts cut inside and against all experts on every rank: seconds, memory, uneven routing.

python -m benchmarks.experts             # two ranks, one thread each: some four minutes on two cores
python -m benchmarks.experts --ranks 4   # four, which two cores share: memory is what it shows

Three ways take the same step of the same mixture of experts: ``--expert_parallel_size``, ``--model_parallel_size`` (a
tensor-parallel rank has a part of every expert) and data parallel alone. A share of the tokens go to expert 0, whatever
their router says, in all three. CPU seconds are those of the busiest rank, whatever else the machine does. Memory is
measured as in ``benchmarks.memory``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines import Workload, with_engine
from benchmarks.memory import measure
from benchmarks.step import ROOT
from fft.console import format_table, say
from fft.training.engine import StageEngine

#: 16 experts, two of them a token's.
_MODEL = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 4096},
    **{"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 1 << 20},
}
_TOKENS, _STEPS = 512, 4
_SHARES = (0.0, 0.5)


def ways(ranks: int) -> dict[str, tuple[int, str]]:
    """Micro-batches of a rank, for steps of the same tokens, and flags."""
    return {
        "experts over ranks": (2, f"--expert_parallel_size={ranks}"),
        "experts over ranks, selective": (2, f"--expert_parallel_size={ranks} --checkpoint_grad_selective"),
        "cut inside": (2 * ranks, f"--model_parallel_size={ranks}"),
        "all on every rank": (2, ""),
    }


def main() -> int:
    """Launch each way with each share, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks of this machine (default: 2)")
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        told = cost_of(*ways(args.ranks)[args.rank_of], args.share)
        (args.into / os.environ["RANK"]).write_text(json.dumps(told))
        return 0
    rows = []
    for share in _SHARES:
        for way in ways(args.ranks):
            say(f"{way}, {share:.0%} of the tokens to expert 0 besides ...")
            told = _launch(way, share, args.ranks)
            most = [max(rank[key] for rank in told) for key in ("wall", "cpu", "predicted", "measured")]
            rows.append([way, share, *most])
    sizes = f"{_MODEL['num_hidden_layers']} layers of {_MODEL['hidden_size']}, {_MODEL['num_experts']} experts"
    print(f"{args.ranks} ranks, {sizes}, {2 * args.ranks * _TOKENS} tokens a step, fp32; the fullest rank's MB")
    print(format_table(("", "share", "s/step", "CPU s/step", "predicted MB", "measured MB"), rows))
    return 0


def cost_of(micro_batches: int, flags: str, share: float) -> dict[str, float]:
    """Seconds of a step, and MB of this rank, predicted and measured. Collective."""
    from transformers import AutoConfig

    _favour(share)
    given = Workload(AutoConfig.for_model(**_MODEL), _TOKENS, micro_batches, flags=tuple(flags.split()), noise=True)
    memory = measure(given)

    def seconds(step: Callable[[], float], _: StageEngine) -> dict[str, float]:
        told: dict[str, list[float]] = {"wall": [], "cpu": []}
        for _ in range(_STEPS + 1):
            begun = time.perf_counter(), time.process_time()
            step()
            told["wall"].append(time.perf_counter() - begun[0])
            told["cpu"].append(time.process_time() - begun[1])
        return {name: statistics.median(times[1:]) for name, times in told.items()}

    sizes = {"predicted": memory["total"] / 1e6, "measured": memory["peak"] / 1e6}
    return with_engine(given, seconds) | sizes


def _favour(share: float) -> None:
    """Send the first choice of so many of the tokens to expert 0."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    forward = Qwen3MoeExperts.forward

    def favouring(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        chosen = top_k_index.clone()
        chosen[: int(share * len(chosen)), 0] = 0
        return forward(self, hidden_states, chosen, top_k_weights)

    Qwen3MoeExperts.forward = favouring


def _launch(way: str, share: float, ranks: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        flags = ("--ranks", str(ranks), "--rank_of", way, "--share", str(share), "--into", folder)
        command = [sys.executable, *launcher, "-m", "benchmarks.experts", *flags]
        # Blocks of 64 KiB and more go back to the system when they are freed.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
        environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    sys.exit(main())
