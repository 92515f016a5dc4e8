"""Preferences beside TRL: its formula on the same log-probabilities, its trainer on the same pairs in their order."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, VOCAB
from datasets import Dataset
from forked import run_ranks
from pairs import random_pairs, write_pairs
from test_dpo import BETA, LR, SEQ_LEN, flags, numbers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from fft.arguments import parse_arguments
from fft.data.batches import BatchPlan, step_batches
from fft.models.in_process import write_random_model
from fft.parity_run import read_outcome
from fft.planning.preflight import plan_run
from fft.training.preference import MEASURES, Preference

STEPS, GLOBAL_BATCH, SFT = 4, 8, 0.5

#: Name: our flags, TRL's settings, and the ranks of our run, each variant on another layout.
VARIANTS = {
    "sigmoid": ("", {}, "--pipe_parallel_size=2"),
    "normalized": ("--dpo_length_normalized", {"loss_type": ["sigmoid_norm"]}, "--sequence_parallel_size=2"),
    "mixed": (
        f"--dpo_sft_weight={SFT}",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, SFT]},
        "--model_parallel_size=2",
    ),
    "both": (
        f"--dpo_length_normalized --dpo_sft_weight={SFT}",
        {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1.0, SFT]},
        "--zero_stage=1",
    ),
}


class Peer(DPOTrainer):
    """TRL's trainer of pairs whose ids are known, one after the other; it tells nobody that it runs."""

    @classmethod
    def on(cls, model, pairs, args):
        words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB)}, "0"))
        return cls(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list([as_trl_has_it(pair) for pair in pairs]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
        )

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _send_telemetry(self):
        pass


def settings(folder, more):
    return DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=GLOBAL_BATCH,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        max_grad_norm=0.5,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def as_trl_has_it(pair):
    (chosen, labels), (rejected, _) = pair
    prompt = labels.count(-100)
    return {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def dealt(args, pairs):
    """The pairs of each step's samples, in their order: the trainer is asked, which has one pair a sample here."""
    plan, by_ids = plan_run(args, 1), {tuple(pair[0][0] + pair[1][0]): pair for pair in pairs}
    found = []
    for step in range(STEPS):
        batches = step_batches(plan.train, BatchPlan(1, 0, GLOBAL_BATCH, 1), step * GLOBAL_BATCH, plan.total_samples)
        for batch in batches:
            first, middle, end = itertools.islice(np.unique(batch.cu_seqlens).tolist(), 3)
            ids = batch.input_ids[0].tolist()
            found.append(by_ids[tuple(ids[first:end])])
            assert ids[first:middle] == found[-1][0][0]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and pairs of which two are too long for one sample."""
    folder = tmp_path_factory.mktemp("trl")
    write_random_model(AutoConfig.for_model(**{**SMALL, "model_type": "llama"}), folder / "llama", seed=1)
    drawn = random_pairs(400, VOCAB, longest=24)
    pairs = [pair for pair in drawn if SEQ_LEN // 2 < sum(len(ids) for ids, _ in pair) <= SEQ_LEN][:100]
    write_pairs(folder / "train", pairs)
    write_pairs(folder / "held-out", pairs[:9])
    return folder, pairs


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_what_trl_does(variant, made, tmp_path):
    (ours, theirs, layout), (folder, pairs) = VARIANTS[variant], made
    steps = f"--max_steps={STEPS} --save_steps={STEPS}".split()
    given = [*flags(folder, "llama", tmp_path), *steps, *ours.split()]
    micro_batches = GLOBAL_BATCH // (2 if "zero" in layout else 1)
    done = run_ranks(2, *given, *layout.split(), f"--gradient_accumulation_steps={micro_batches}", "--logging_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [*flags(folder, "llama", tmp_path / "unused"), *steps, f"--gradient_accumulation_steps={GLOBAL_BATCH}"]
    in_order = dealt(parse_arguments(alone), pairs)
    peer = Peer.on(folder / "llama", in_order, settings(tmp_path / "trl", theirs))
    begun = {name: value.clone() for name, value in peer.model.state_dict().items()}
    peer.train()
    expected = [line for line in peer.state.log_history if "loss" in line]
    assert len(expected) == STEPS
    told = [line for line in numbers(tmp_path / "run") if "loss" in line]
    names = ["loss", "grad_norm", *(MEASURES if "normalized" not in ours else ())]  # it tells rewards of sums
    for name in names:
        first = 1 if name == "rewards/accuracies" else 0  # at first all margins are 0, but for rounding
        mine, its = ([line[name] for line in lines[first:]] for lines in (told, expected))
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-5), name
    assert len({round(line["loss"], 4) for line in told}) > 1  # of the same loss nothing would be shown
    weights = read_outcome(tmp_path / "run").weights
    for name, value in peer.model.state_dict().items():
        moved = float((value - begun[name]).norm())
        assert float((weights[name] - value).norm()) <= 1e-4 * moved, name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_their_gradients_are_those_of_trls_formula(variant, made, tmp_path):
    """Of the same log-probabilities of tokens, a pair at a time: its mean over tokens is one of all chosen answers."""
    (ours, theirs, _), (folder, pairs) = VARIANTS[variant], made
    peer = Peer.on(folder / "llama", pairs[:1], settings(tmp_path, theirs))
    peer.precompute_ref_logps = True  # which come with a batch
    ours = Preference.of(parse_arguments([*flags(folder, "llama", tmp_path), *ours.split()]))
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(1, 40, (2,), generator=rng)
        mask = torch.zeros(2, 45, dtype=torch.int64)  # of prompts of 3 tokens
        for row, count in enumerate(tokens.tolist()):
            mask[row, 3 : 3 + count] = 1
        each = torch.rand(2, 45, generator=rng, dtype=torch.float64).mul(-6).mul_(mask)[:, 1:].requires_grad_()
        reference = each.detach().sum(1) + torch.randn(2, generator=rng, dtype=torch.float64) * 5
        nothing = torch.zeros(2, 44)
        outputs = SimpleNamespace(log_probs=each, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        inputs |= {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
        expected = peer._compute_loss(lambda outputs=outputs, **_: outputs, inputs, False)
        (wanted,) = torch.autograd.grad(expected, each)
        (found,), _ = ours.losses(each.sum(1)[None], reference[None], tokens[None])
        (gradient,) = torch.autograd.grad(found, each)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient * mask[:, 1:], wanted * mask[:, 1:], rtol=1e-12, atol=1e-12)
