"""What does not go together with preferences is refused before anything expensive."""

import json

import pytest
from conftest import SMALL, VOCAB, write_table
from pairs import random_pairs, write_pairs
from transformers import AutoConfig

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.models.in_process import write_random_model
from fft.planning.objective import check_balance, reference_model
from fft.planning.preflight import plan_run
from fft.weights.hf import WeightReader

BASE = ["--model", "m", "--train_data", "t", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dpo_beta", "0.2"], "--dpo_beta is for --objective dpo: add that, or leave it out."),
        (["--dpo_length_normalized"], "--dpo_length_normalized is for --objective dpo"),
        (["--dpo_sft_weight", "1"], "--dpo_sft_weight is for --objective dpo"),
        (["--objective", "dpo", "--dpo_beta", "0"], "--dpo_beta 0 must be more than 0"),
        (["--objective", "dpo", "--init"], "needs a model that answers already, as the reference: leave --init out."),
        (["--objective", "dpo", "--compile"], "does not go with --compile"),
    ],
)
def test_flags(flags, sentence):
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        parse_arguments([*BASE, *flags])


def test_experts_in_balance():
    args = parse_arguments([*BASE, "--objective", "dpo"])
    check_balance(args, False)
    check_balance(parse_arguments(BASE), True)
    with pytest.raises(UserError, match="does not go with a loss that keeps experts in balance"):
        check_balance(args, True)


def test_tables_and_references(tmp_path):
    write_random_model(AutoConfig.for_model(**SMALL, model_type="llama"), tmp_path / "model", seed=1)
    pairs, texts = write_pairs(tmp_path / "pairs", random_pairs(9, VOCAB)), tmp_path / "texts"
    write_table(texts, [[1, 2, 3]] * 4)
    given = ["--model", str(tmp_path / "model"), "--seq_len", "64", "--output_dir", str(tmp_path / "out")]
    learns = [*given, "--objective", "dpo", "--pack", "best-fit"]
    with pytest.raises(UserError, match=r"--train_data .*texts has no preferences, which --objective dpo learns"):
        plan_run(parse_arguments([*learns, "--train_data", str(texts)]), 1)
    with pytest.raises(
        UserError, match=r"--train_data .*pairs has preferences, of which half was rejected: give --obj"
    ):
        plan_run(parse_arguments([*given, "--train_data", str(pairs)]), 1)
    with pytest.raises(UserError, match="has no preferences"):
        plan_run(parse_arguments([*learns, "--train_data", f"{pairs}:1 {texts}:1"]), 1)
    args = parse_arguments([*learns, "--train_data", str(pairs)])
    plan = plan_run(args, 1)
    assert plan.train.pairs
    name = reference_model(args, plan.config, plan.weights)
    assert name != reference_model(
        parse_arguments([*learns, "--train_data", "t", "--dtype", "fp32"]), plan.config, plan.weights
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    other = AutoConfig.for_model(**config)
    assert name != reference_model(args, other, plan.weights)
    write_random_model(plan.config, tmp_path / "other", seed=2)
    assert name != reference_model(args, plan.config, WeightReader(tmp_path / "other"))
