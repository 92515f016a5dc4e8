"""What a step costs by where its vision tower is: on all ranks, in stages of its own, on the first stage, or cut with
the decoder; a real run each, on gloo, beside what the planner's arithmetic predicts.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.loader import ROOT
from fft.arguments import TrainArguments, resolve
from fft.console import format_table, say
from fft.data.commits import commit
from fft.data.image_tallies import image_facts, tally_images
from fft.data.manifest import FileInfo, Manifest
from fft.images.grids import grid_of, tokens_of
from fft.images.rules import ImageRules
from fft.models.in_process import write_random_model
from fft.models.spec import ModelSpec
from fft.parallel.mesh import MeshSizes
from fft.planning.image_load import load_of, manifests_of
from fft.planning.layout import Layout, plan_layout
from fft.planning.partition import pipeline_bubble

RULES = ImageRules("qwen2_vl", 8, 2, 2, 1995, 1993, 1994, min_pixels=64, max_pixels=1 << 20)
SEQ_LEN, BLOCKS, LAYERS = 512, 12, 8
_FIRST = f"{BLOCKS + 2 + 1 + LAYERS // 2},{LAYERS // 2 + 2}"
#: Flags by where the tower is.
PLACES = {
    "all ranks": "--encoder_pipe_parallel_size 0",
    "all ranks, run twice": "--encoder_pipe_parallel_size 0 --checkpoint_grad_interval 1",
    "its own stage": "--encoder_pipe_parallel_size 1",
    "first stage": f"--encoder_pipe_parallel_size -1 --partition_method {_FIRST}",
    "cut with decoder": "--encoder_pipe_parallel_size -1",
}


def measure_steps(args: argparse.Namespace) -> None:
    """Print seconds of a step, beside the prediction, and memory."""
    work = args.work.resolve() / "vision-steps"
    model, table = make_model(work / "model"), make_table(work / "table")
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.repeats):
        for place in PLACES:
            found.setdefault(place, []).append(run(place, model, table, work, args))
    predicted = {place: predict(place, model, table, args) for place in PLACES}
    first = next(iter(PLACES))
    rows = []
    for place, measured in found.items():
        seconds = statistics.median(cost for cost, _ in measured)
        ratio = seconds / statistics.median(cost for cost, _ in found[first])
        rows.append([place, seconds, ratio, predicted[place] / predicted[first], max(m for _, m in measured) / 1e6])
    print(f"{args.ranks} stages, one thread each; {args.micro_batches} micro-batches of {SEQ_LEN} tokens a step, half")
    print(f"of them texts; the median of {args.repeats} runs of {args.steps} steps")
    print(format_table(("tower on", "s/step", "of all ranks", "predicted", "peak MB"), rows))


def make_model(folder: Path) -> Path:
    """A small Qwen2-VL, of whose arithmetic the tower has half."""
    if (folder / "config.json").exists():
        return folder
    text = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
    vision = {"depth": BLOCKS, "num_heads": 4, "patch_size": RULES.patch, "embed_dim": 192, "hidden_size": 256}
    ids = {"image_token_id": RULES.image_token, "vision_start_token_id": RULES.start_token}
    ids |= {"vision_end_token_id": RULES.end_token, "tie_word_embeddings": False}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, **ids)
    write_random_model(config, folder, seed=0)
    return folder


def make_table(folder: Path) -> Path:
    """Rows of SEQ_LEN tokens, every second one a text; images of very different sizes."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(128):
        ids: list[int] = []
        row = {"image_grids": [], "images": [], "cu_seqlens": [0]}
        while number % 2 == 0:
            width, height = (int(side) for side in np.exp(rng.uniform(np.log(16), np.log(360), 2)))
            grid = grid_of(RULES, width, height)
            chat = [RULES.start_token, *[RULES.image_token] * tokens_of(RULES, grid), RULES.end_token]
            chat += rng.integers(0, 1990, int(rng.integers(5, 40))).tolist()
            if len(ids) + len(chat) > SEQ_LEN:
                break
            ids += chat
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(stream, "JPEG")
            row["image_grids"] += grid
            row["images"].append(stream.getvalue())
            row["cu_seqlens"].append(len(ids))
        if len(ids) < SEQ_LEN:
            ids += rng.integers(0, 1990, SEQ_LEN - len(ids)).tolist()
            row["cu_seqlens"].append(SEQ_LEN)
        rows.append(row | {"input_ids": ids})
    ints = dict.fromkeys(("input_ids", "cu_seqlens", "image_grids"), pa.list_(pa.int32()))
    data = pa.Table.from_pylist(rows, pa.schema(ints | {"images": pa.list_(pa.binary())}))
    pq.write_table(data, folder / "part-00000.parquet", row_group_size=16)
    part, tokens = folder / "part-00000.parquet", len(rows) * SEQ_LEN
    files = (FileInfo(part.name, len(rows), tokens, part.stat().st_size),)
    facts = {"vision": RULES.facts(), "lineage": {"counts": {"vision": image_facts(tally_images(data), RULES.merge)}}}
    commit(folder, Manifest(files, len(rows), tokens, seq_len=SEQ_LEN, **facts))
    return folder


def flags(place: str, model: Path, table: Path, args: argparse.Namespace) -> list[str]:
    """Those of a run."""
    given = f"--model {model} --train_data {table} --seq_len {SEQ_LEN} --max_steps {args.steps} --dtype fp32 "
    given += f"--pipe_parallel_size {args.ranks} --gradient_accumulation_steps {args.micro_batches} --logging_steps 1 "
    return shlex.split(given + PLACES[place])


def run(place: str, model: Path, table: Path, work: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, the median of all but the first two, and the most memory of a rank."""
    say(f"tower on {place} ...")
    out = work / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    command = [*torchrun, "fft/train.py", *flags(place, model, table, args), "--checkpoint", str(out), "--overwrite"]
    done = subprocess.run([*command, "--save_steps", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{place} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    ends = [line["seconds"] for line in steps][1:]
    return statistics.median(b - a for a, b in pairwise(ends)), max(line["memory"] for line in steps)


def predict(place: str, model: Path, table: Path, args: argparse.Namespace) -> float:
    """A step's length in the arithmetic of a stage, images as large as in the mean, sending free."""
    given = dict(zip(*[iter(word.removeprefix("--") for word in flags(place, model, table, args))] * 2, strict=True))
    typed = {name: int(value) if value.lstrip("-").isdigit() else value for name, value in given.items()}
    settings = resolve({"output_dir": str(model / "unused"), **typed})
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    shared = settings.encoder_pipe_parallel_size == 0
    spec = ModelSpec(config, torch.float32, images=RULES, shared_tower=shared)
    load = load_of(settings, RULES, manifests_of(str(table)))
    layout = plan_layout(settings, spec, MeshSizes(1, args.ranks), True, load)
    return _length(settings, layout)


def _length(settings: TrainArguments, layout: Layout) -> float:
    again = bool(settings.checkpoint_grad_interval)
    forward = [sum(cost.flops for cost in layout.costs[a:b]) for a, b in pairwise(layout.bounds)]
    backward = [
        sum(cost.backward + (cost.flops if again else 0) for cost in layout.costs[a:b])
        for a, b in pairwise(layout.bounds)
    ]
    micro_batches, stages = settings.gradient_accumulation_steps, len(forward)
    busy = micro_batches * (sum(forward) + sum(backward))
    pipeline = busy / (stages * (1 - pipeline_bubble(stages, micro_batches, forward, backward)))
    tower = sum(cost.flops * (2 if again else 1) + cost.backward for cost in layout.shared)
    return pipeline + micro_batches * tower / stages


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the measurement."""
    parser.set_defaults(measure=measure_steps)
    parser.add_argument("--ranks", type=int, default=2, help="stages of the pipeline, a process each")
    parser.add_argument("--micro_batches", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turn")
