"""Runs of the trainer, in one process, on the device under test: the model, the command, and what it left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig

from benchmarks.device.machine import unlaunched

HERE = Path(__file__).resolve().parent
#: No longer than a tile of an attention kernel. Of longer documents several tiles add to a query's gradient, in any
#: order: PyTorch's and flash-attn's kernels give other last bits each time.
ONE_TILE = 64


def config_of(small: bool, **changes) -> PretrainedConfig:
    """A Llama whose weights are large enough for all of it to matter to the loss."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 101}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}
    if not small:
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 509}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.07}
    return AutoConfig.for_model("llama", **sizes, **heads, max_position_embeddings=4096, **changes)


def train(device: torch.device, *flags: object, program: tuple[object, ...] = ("-m", "fft.train"), code: int = 0):
    """``python -m fft.train`` with ``flags`` on a type of device; fails where it does not end with ``code``."""
    variables = unlaunched()
    # Drivers beside this file find fft where these tests found it.
    found = [str(HERE), os.getcwd(), variables.get("PYTHONPATH", "")]
    variables |= {"DS_ACCELERATOR": device.type, "PYTHONPATH": os.pathsep.join(filter(None, found))}
    words = [str(word) for word in (sys.executable, *program, *flags)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done


def read_metrics(run: Path) -> tuple[list[dict], list[float]]:
    """Of a run folder: what each step told, and the losses of evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [x for x in lines if "loss" in x], [x["eval_loss"] for x in lines if "eval_loss" in x]


def column(steps: list[dict], name: str) -> np.ndarray:
    """A number of every step."""
    return np.array([step[name] for step in steps])


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative."""
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
