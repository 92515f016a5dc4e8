"""Losses by dataset on every kind of layout against one process: transformers, a document at a time."""

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, VOCAB
from forked import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint.folder import checkpoint_tag
from fft.data.batches import micro_batch
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.models.in_process import write_random_model
from fft.planning.preflight import batch_plan, plan_run
from fft.report.page import page_of
from fft.report.run import read_run

pytestmark = pytest.mark.slow

#: Token ``i`` is of dataset ``i % 4``; documents of the last one say of none.
NAMES = ("web", "books: old/new", "code", None)
TOLD = ("web", "books_ old_new", "code", "unnamed")

#: Name: ranks, flags. Samples cut packed rows, or hold whole ones; a batch has several.
LAYOUTS = {
    "pipe2": (2, "--pipe_parallel_size=2 --gradient_accumulation_steps=3"),
    "data2-ragged": (2, "--per_device_train_batch_size=3 --ragged --pack=best-fit"),
    "sequence2": (2, "--sequence_parallel_size=2 --per_device_train_batch_size=2"),
    "tensor2": (2, "--model_parallel_size=2 --per_device_train_batch_size=2"),
    "pipe2-sequence2": (4, "--pipe_parallel_size=2 --sequence_parallel_size=2"),
}
#: Those that train on both tables, of which one counts no datasets: it is one.
MIXED = ("data2-ragged", "sequence2")


def write(folder, rng, packed):
    """Documents of one token and more, some of which labels leave out; packed rows also have empty ones."""
    folder.mkdir()
    ids, labels, bounds, names = [], [], [], []
    for _ in range(30):
        lengths = rng.integers(0 if packed else 1, 16, rng.integers(2, 6) if packed else 1)
        lengths[0] = max(1, lengths[0])
        of = rng.integers(0, len(NAMES), len(lengths))
        documents = [4 * rng.integers(0, VOCAB // 4, length) + own for length, own in zip(lengths, of, strict=True)]
        ids.append(np.concatenate(documents))
        labels.append(np.where(rng.random(len(ids[-1])) < 0.3, -100, ids[-1]))
        bounds.append(np.cumsum([0, *lengths]))
        names.append([NAMES[own] for own in of])
    data = {"input_ids": pa.array(ids, pa.list_(pa.int32())), "labels": pa.array(labels, pa.list_(pa.int32()))}
    if packed:
        data["cu_seqlens"] = pa.array(bounds, pa.list_(pa.int32()))
    data["dataset"] = pa.array(names) if packed else pa.array([own[0] for own in names]).dictionary_encode()
    file = folder / "part-0.parquet"
    pq.write_table(pa.table(data), file, row_group_size=7)
    if packed:
        size, tokens = file.stat().st_size, sum(map(len, ids))
        counts = {"datasets": {name or "": {"rows": 1, "tokens": 1} for name in NAMES}}
        files = (FileInfo(file.name, len(ids), tokens, size),)
        commit(folder, Manifest(files, len(ids), tokens, lineage={"counts": counts}))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    write_random_model(AutoConfig.for_model(**{**SMALL, "model_type": "llama"}), folder / "model", seed=1)
    for name in ("packed", "rows"):
        write(folder / name, rng, name == "packed")
    given = f"--model={folder}/model --train_data={folder}/packed --seq_len=64 --max_steps=1 --dtype=fp32"
    return [*given.split(), "--learning_rate=1e-2", f"--eval_data=a={folder}/packed b={folder}/rows"]


def by_dataset(model, reader, samples) -> dict[str, tuple[float, int]]:
    """Mean loss and number of predicted tokens of each dataset, which tokens are of by what they are, or, in a mixture,
    by the table that counts none."""
    sums = {}
    for index in range(samples):
        batch = micro_batch(reader, [index], index + 1)
        whole = len(reader.members) > 1 and reader.member(index)[0].table.manifest is None
        bounds = np.unique(batch.cu_seqlens)
        for begin, end in itertools.pairwise(bounds):
            ids, labels = (torch.from_numpy(x[begin:end]).long() for x in (batch.input_ids[0], batch.labels))
            if (labels == -100).all():
                continue
            losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0], labels, reduction="none")
            name = "rows" if whole else TOLD[int(ids[0]) % 4]
            before, count = sums.get(name, (0.0, 0))
            sums[name] = before + float(losses.double().sum()), count + int((labels != -100).sum())
    return {name: (loss / count, count) for name, (loss, count) in sums.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_equals_one_process(layout, flags, tmp_path):
    ranks, more = LAYOUTS[layout]
    given = [*flags, *more.split(), f"--checkpoint={tmp_path / 'run'}", "--save_steps=1"]
    if layout in MIXED:
        (packed,) = (flag for flag in flags if flag.startswith("--train_data="))
        given.append(f"{packed} {packed.partition('=')[2].replace('packed', 'rows')}")
    done = run_ranks(ranks, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in numbers if "eval_loss" in line)
    begun, ended = flags[0].removeprefix("--model="), tmp_path / "run" / checkpoint_tag(1)
    args = parse_arguments([*given, "--overwrite"])
    plan = plan_run(args, ranks)
    readers, (trained,) = plan.evaluations, (line for line in numbers if "grad_norm" in line)
    models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False) for folder in (begun, ended)]
    for model, told in zip(models, (first, last), strict=True):
        for table, reader in readers.items():
            expected = by_dataset(model, reader, reader.samples_per_epoch)
            assert set(expected) == set(TOLD)
            for name, (loss, count) in expected.items():
                assert told[f"eval/{table}/loss/{name}"] == pytest.approx(loss, rel=1e-5)
                assert told[f"eval/{table}/tokens/{name}"] == count
            losses, counts = ([told[f"eval/{table}/{what}/{n}"] for n in TOLD] for what in ("loss", "tokens"))
            assert sum(counts) == told[f"eval/{table}/tokens"]
            assert np.average(losses, weights=counts) == pytest.approx(told[f"eval/{table}/loss"], rel=1e-6)
    samples = batch_plan(args, plan.mesh, 0).global_batch
    expected = by_dataset(models[0], plan.train, samples)
    assert {f"loss/{name}" for name in expected} == {name for name in trained if name.startswith("loss/")}
    assert ("rows" in expected) == (layout in MIXED)
    for name, (loss, count) in expected.items():
        assert trained[f"loss/{name}"] == pytest.approx(loss, rel=1e-5)
        assert trained[f"tokens/{name}"] == count
    assert [told[f"eval_loss/{name}"] for name in TOLD] == [told[f"eval/a/loss/{name}"] for name in TOLD]
    line = re.search(r"step 1/1  validation loss of b by dataset: (.*)", done.stderr)[1]
    assert f"web {last['eval/b/loss/web']:.4f} over {last['eval/b/tokens/web']:,}" in line
    assert f"last of a, by dataset: books_ old_new {last['eval_loss/books_ old_new']:.4f} (perplexity" in done.stderr
    page = page_of([read_run(tmp_path / "run")])
    assert "Held out by dataset: a" in page
    assert "Trained on by dataset" in page
    (one, *_) = expected
    assert f"<td>{trained[f'loss/{one}']:.4f}</td>" in page
    assert f"<td>{last['eval/b/loss/unnamed']:.4f}</td>" in page
