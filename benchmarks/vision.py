"""Vision-language training beside its peers, a measurement a subcommand.

python -m benchmarks.vision loader                # images a second of one core, from files to patches; installs a peer
python -m benchmarks.vision step                  # seconds of a step, by where the tower is

`loader` draws JPEGs, writes them into a token table (Qwen2-VL's rules, rows of 8,192 tokens) and into MosaicML's
shards, and reads each once in a process of its own: ours to the uint8 patches and positions of micro-batches, the
others to the pixel values of transformers' processor (its PIL backend, which it takes where torchvision is not
installed).
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import vision_steps
from benchmarks.loader import ROOT, peer_environment
from fft.console import format_table, say
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest, read_manifest
from fft.data.part_files import PartFile, PartFolder
from fft.data.worker_notes import WorkerNotes
from fft.images.grids import grid_of, tokens_of
from fft.images.pixels import size_of
from fft.images.rules import ImageRules

#: Of Qwen2-VL as published.
RULES = ImageRules("qwen2_vl", 14, 2, 2, 151655, 151652, 151653, min_pixels=56 * 56, max_pixels=12_845_056)
SEQ_LEN = 8192
#: The processor's arrays of 18 MB go back to the kernel after each image, or stay, by chance of what else a process has
#: loaded. Here all processes keep what they have had, which is the faster by a half for the processor.
_MALLOC = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
}
KINDS = {
    "fft": "table to patches and positions",
    "transformers": "bytes in memory to pixel values",
    "mosaic": "shards to pixel values",
    "mosaic-rgb": "shards to RGB, not resized",
}


def main() -> int:
    """Run one measurement."""
    args = _parse()
    args.measure(args)
    return 0


def measure_loader(args: argparse.Namespace) -> None:
    """Print what each loader costs."""
    work = args.work.resolve()
    table = make_table(work / f"images-{args.images}", args.images)
    costs: dict[str, dict[str, float]] = {}
    for _ in range(args.repeats):
        for kind in args.only or KINDS:
            costs[kind] = min(run(kind, table, work, args.core), costs.get(kind), key=_busy)
    header = ("loader", "what", "images/s", "images/CPU s", "of fft", "peak MB")
    ours = costs.get("fft")
    rows = []
    for kind, cost in costs.items():
        rate = cost["images"] / cost["busy"]
        share = f"{rate / (ours['images'] / ours['busy']):.2f}" if ours else "-"
        rows.append([kind, KINDS[kind], cost["images"] / cost["seconds"], rate, share, cost["peak_bytes"] / 1e6])
    print(f"{args.images} JPEGs of about 1000 x 750 pixels, one core, the best of {args.repeats} in turn")
    print(format_table(header, rows))


def _busy(cost: dict[str, float] | None) -> float:
    return cost["busy"] if cost else math.inf


def make_table(folder: Path, count: int) -> Path:
    """A packed table of chats about ``count`` JPEGs, as the jobs write it."""
    if folder.exists() and read_manifest(folder) is not None:
        return folder
    say(f"making {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    rng, part = np.random.default_rng(0), None
    with PartFile(PartFolder(folder, WorkerNotes(str(folder), "")), 0) as sink:
        rows: list[dict[str, list]] = [_empty()]
        for number in range(count):
            data = _photograph(rng)
            size = size_of(data)
            grid = grid_of(RULES, size.width, size.height)
            texts = rng.integers(0, 151_000, int(rng.integers(20, 80))).tolist()
            ids = [RULES.start_token, *[RULES.image_token] * tokens_of(RULES, grid), RULES.end_token, *texts]
            if len(rows[-1]["input_ids"]) + len(ids) > SEQ_LEN:
                sink.write(_batch(rows))
                rows = [_empty()]
            row = rows[-1]
            row["input_ids"] += ids
            row["labels"] += [-100] * (len(ids) - len(texts)) + texts
            row["cu_seqlens"].append(len(row["input_ids"]))
            row["image_grids"] += grid
            row["images"].append(data)
            row["doc_ids"].append(str(number))
        sink.write(_batch(rows))
        part = sink.finish({})
    (folder / part.name).rename(folder / "part-00000.parquet")
    files = (FileInfo("part-00000.parquet", part.rows, part.tokens, part.bytes),)
    commit(folder, Manifest(files, part.rows, part.tokens, seq_len=SEQ_LEN, vision=RULES.facts()))
    return folder


def _photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of 1/f noise, whose details are spread over sizes as those of photographs are."""
    width, height = (int(side * rng.uniform(0.9, 1.1)) for side in (1000, 750))
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitudes = 1 / np.maximum(np.hypot(x, y), 1 / width)
    grey, *colours = (
        np.fft.irfft2(amplitudes * np.exp(2j * np.pi * rng.random(amplitudes.shape)), (height, width)) for _ in range(4)
    )
    pixels = np.stack([grey + 0.3 * colour for colour in colours], axis=2)
    scaled = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    stream = io.BytesIO()
    Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("input_ids", "labels", "cu_seqlens", "image_grids"), pa.list_(pa.int32())),
        "images": pa.list_(pa.binary()),
        "doc_ids": pa.list_(pa.string()),
    }
)


def _empty() -> dict[str, list]:
    return {name: [0] if name == "cu_seqlens" else [] for name in _SCHEMA.names}


def _batch(rows: list[dict[str, list]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, _SCHEMA)


def run(kind: str, table: Path, work: Path, core: int) -> dict[str, float]:
    """What it costs to read all images once, on one core."""
    say(f"{kind} ...")
    python = peer_environment(work, "mosaic") if kind.startswith("mosaic") else Path(sys.executable)
    if python is None:
        raise RuntimeError("mosaicml-streaming could not be installed: leave it out with --only.")
    command = ["taskset", "-c", str(core), str(python), "benchmarks/peers/images.py", kind, str(table), str(work)]
    environment = {**os.environ, **_MALLOC, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    loader = commands.add_parser("loader", help="images a second of one core, from files to patches")
    loader.set_defaults(measure=measure_loader)
    loader.add_argument("--images", type=int, default=400, help="JPEGs")
    loader.add_argument("--repeats", type=int, default=3, help="the best of so many, by CPU time")
    loader.add_argument("--core", type=int, default=0, help="the core on which each process runs")
    loader.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="kept between runs")
    loader.add_argument("--only", nargs="+", choices=KINDS, help="default: all")
    step = commands.add_parser("step", help="seconds of a step, by where the tower is")
    step.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="kept between runs")
    vision_steps.add_flags(step)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
