"""Preferences on every kind of layout against one process: transformers and torch.optim, a document at a time."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, VOCAB
from forked import run_ranks
from pairs import random_pairs, write_pairs
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.data.batches import BatchPlan, step_batches
from fft.models.in_process import write_random_model
from fft.models.lora import freeze
from fft.parity_reference import Outcome
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run
from fft.training.schedule import lr_multiplier

STEPS, GLOBAL_BATCH, SEQ_LEN, LR, BETA = 3, 8, 48, 1e-3, 0.3
#: By how much a parameter's gradient may differ, relative to its norm, and one of its entries relative to the largest.
#: fp32 leaves 2.5e-6 of both.
EXACT = 1e-5

#: Of pairs, in turn.
DATASETS = ("shop", "bank")
#: Name: ranks, flags of the layout, flags of the objective. Samples have one to four pairs.
LAYOUTS = {
    "pipe2-tied": (2, "--pipe_parallel_size=2 --gradient_accumulation_steps=8 --checkpoint_grad_interval=1", ""),
    "data2": (
        2,
        "--per_device_train_batch_size=2 --gradient_accumulation_steps=2 --ragged",
        "--dpo_length_normalized --dpo_sft_weight=0.5",
    ),
    "sequence2": (2, "--sequence_parallel_size=2 --gradient_accumulation_steps=8", "--dpo_length_normalized"),
    "tensor2": (2, "--model_parallel_size=2 --gradient_accumulation_steps=8", "--dpo_sft_weight=0.5"),
    # Of a head that is not trained the logits are made once.
    "tensor2-frozen": (2, "--model_parallel_size=2 --gradient_accumulation_steps=8", "--freeze=lm_head"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models of two families, tables of pairs, and these by the ids of their documents."""
    folder = tmp_path_factory.mktemp("dpo")
    for name, more in {"llama": {"model_type": "llama"}, "qwen2-tied": {"model_type": "qwen2"}}.items():
        config = AutoConfig.for_model(**{**SMALL, **more, "tie_word_embeddings": name == "qwen2-tied"})
        write_random_model(config, folder / name, seed=1)
    pairs = {"train": random_pairs(50, VOCAB), "held-out": random_pairs(9, VOCAB, seed=1)}
    for name, own in pairs.items():
        write_pairs(folder / name, own, datasets=[DATASETS[at % 2] for at in range(len(own))])
    return folder, pairs


def flags(folder, family, output) -> list[str]:
    return (
        f"--model={folder / family} --train_data={folder / 'train'} --eval_data={folder / 'held-out'} "
        f"--objective=dpo --dpo_beta={BETA} --seq_len={SEQ_LEN} --pack=best-fit --max_steps={STEPS} "
        f"--learning_rate={LR} --max_grad_norm=0.5 --adam_epsilon=1e-5 --dtype=fp32 --seed=3 "
        f"--checkpoint={output / 'run'} --save_steps={STEPS}"
    ).split()


def dealt(found):
    """What there is of pairs, by their datasets."""
    return {name: found[at :: len(DATASETS)] for at, name in enumerate(DATASETS)}


def numbers(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_probability(model, ids, labels):
    """Of what is trained on of a document, and of how many tokens."""
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = [position for position, label in enumerate(labels[1:]) if label != -100]
    return scores[wanted, [labels[position + 1] for position in wanted]].sum(), len(wanted)


def pair_loss(args, model, reference, pair):
    """Loss of a pair, and whether what was chosen has the larger reward."""
    scores = []
    for ids, labels in pair:
        value, tokens = log_probability(model, ids, labels)
        with torch.no_grad():
            before, _ = log_probability(reference, ids, labels)
        scores.append((value, tokens, (value - before) / (tokens if args.dpo_length_normalized else 1)))
    (value, tokens, chosen), (_, _, rejected) = scores
    loss = torch.log1p(torch.exp(-BETA * (chosen - rejected))) - args.dpo_sft_weight * value / tokens
    return loss, bool(chosen > rejected)


def one_process(args, plan, pairs) -> tuple[Outcome, float, dict[str, float], dict[str, tuple[float, int]]]:
    """What a plain loop does, its last accuracy and losses by dataset, held out and trained on, these with their pairs;
    it asks the trainer for documents of a step.
    """
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference = copy.deepcopy(model).requires_grad_(False)
    if args.freeze:
        freeze(model, args.freeze)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices, vectors = ([p for p in parameters.values() if (p.ndim < 2) == small] for small in (False, True))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=args.adam_epsilon)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier("cosine", 0, STEPS, 0.0, 0.1))
    by_ids = {tuple(chosen[0]): number for number, (chosen, _) in enumerate(pairs["train"])}

    def evaluated():
        with torch.no_grad():
            found = [pair_loss(args, model, reference, pair) for pair in pairs["held-out"]]
        by_dataset = {name: float(sum(loss for loss, _ in own)) / len(own) for name, own in dealt(found).items()}
        mean, right = float(sum(loss for loss, _ in found)) / len(found), sum(right for _, right in found) / len(found)
        return mean, right, by_dataset

    losses, norms, evaluations, trained = [], [], [evaluated()], {}
    for step in range(STEPS):
        batches = step_batches(plan.train, BatchPlan(1, 0, GLOBAL_BATCH, 1), step * GLOBAL_BATCH, plan.total_samples)
        documents = [
            tuple(batch.input_ids[0, a:b].tolist())
            for batch in batches
            for a, b in itertools.pairwise(np.unique(batch.cu_seqlens).tolist())
        ]
        chosen = [by_ids[document] for document in documents if document in by_ids]
        assert len(chosen) > GLOBAL_BATCH  # not one a sample
        total = torch.stack([pair_loss(args, model, reference, pairs["train"][number])[0] for number in chosen])
        of = [[x for x, number in zip(total.tolist(), chosen, strict=True) if number % 2 == at] for at in (0, 1)]
        trained = {name: (np.mean(own), len(own)) for name, own in zip(DATASETS, of, strict=True)}
        model.zero_grad()
        total.mean().backward()
        losses.append(total.mean().item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        optimizer.step()
        schedule.step()
    evaluations.append(evaluated())
    gradients = {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items()}
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    outcome = Outcome(losses, norms, weights, gradients, [loss for loss, *_ in evaluations])
    return outcome, *evaluations[-1][1:], trained


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, made, tmp_path):
    (ranks, given, objective), (folder, pairs) = LAYOUTS[layout], made
    family = "qwen2-tied" if "tied" in layout else "llama"
    done = run_ranks(ranks, *flags(folder, family, tmp_path), *given.split(), *objective.split(), "--logging_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [*flags(folder, family, tmp_path / "unused"), *objective.split(), "--gradient_accumulation_steps=8"]
    args = parse_arguments(alone)
    expected, accuracy, by_dataset, trained = one_process(args, plan_run(args, 1), pairs)
    ours = read_outcome(tmp_path / "run")
    assert faults(ours, expected, LR) == []
    assert ours.norms == pytest.approx(expected.norms, rel=EXACT)
    for name, gradient in expected.gradients.items():
        off = ours.gradients[name] - gradient
        assert float(off.norm()) <= EXACT * float(gradient.norm()), name
        assert float(off.abs().max()) <= EXACT * float(gradient.abs().max()), name
    assert "accuracy " in done.stderr
    told = [line for line in numbers(tmp_path / "run") if "eval_loss" in line]
    # Not of the first, in which all margins are 0, but for rounding.
    assert told[-1]["eval_rewards/accuracies"] == pytest.approx(accuracy)
    assert {line["eval_pairs"] for line in told} == {9}
    for name, loss in by_dataset.items():
        assert told[-1][f"eval_loss/{name}"] == pytest.approx(loss, rel=1e-5)
    assert [told[-1][f"eval_pairs/{name}"] for name in DATASETS] == [5, 4]
    (last,) = (line for line in numbers(tmp_path / "run") if line["step"] == STEPS and "grad_norm" in line)
    for name, (loss, count) in trained.items():
        assert (last[f"loss/{name}"], last[f"pairs/{name}"]) == (pytest.approx(loss, rel=1e-5), count)


@pytest.mark.slow
def test_reference_is_computed_once_and_missed_by_name(made, tmp_path):
    """Adapters add nothing at first: their model is the reference. A run that is resumed needs the file."""
    folder, _ = made
    given = [*flags(folder, "llama", tmp_path), "--gradient_accumulation_steps=8", "--lora_dim=2", "--dtype=bf16"]
    kept = {*(folder / "train").glob("_fft_reference-*")}
    done = run_ranks(1, *given, "--logging_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("reference log-probabilities of ") == 2
    first = next(line for line in numbers(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    (file,) = {*(folder / "train").glob("_fft_reference-*")} - kept
    file.unlink()
    done = run_ranks(1, *given, "--resume=auto", f"--max_steps={STEPS + 1}")
    assert done.returncode == 2
    assert f"{file.name} is missing" in done.stderr
