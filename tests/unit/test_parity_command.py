"""The parity command: shrunken models are of the same kind, and a difference is seen, wherever it is."""

import dataclasses
import json

import pytest
import torch
import yaml
from conftest import VOCAB
from forked import WARNINGS, run_ranks
from transformers import AutoConfig

from fft import parity, parity_run
from fft.arguments import resolve
from fft.errors import UserError
from fft.models.small import ROUTED
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES
from fft.parity_run import Outcome, faults, shrunken

LLAMA3_70B = {
    **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}
QWEN2_7B = {
    **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}
QWEN3_06B = {
    **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    **{"tie_word_embeddings": True},
}
QWEN3_MOE = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    **{"num_experts": 128, "num_experts_per_tok": 8},
}


def small(config: dict, **flags):
    args = resolve({"model": "unread", "num_train_epochs": 0.0, "output_dir": "unwritten", **flags})
    return shrunken(AutoConfig.for_model(**config), args)


@pytest.mark.parametrize(
    ("config", "flags", "layers", "heads", "keys"),
    [
        (LLAMA3_70B, {}, 2, 4, 2),
        (LLAMA3_70B, {"pipe_parallel_size": 4, "model_parallel_size": 8}, 4, 16, 8),
        (LLAMA3_70B, {"model_parallel_size": 2, "ulysses_degree": 2, "sequence_parallel_size": 2}, 2, 8, 4),
        (LLAMA3_70B, {"pipe_parallel_size": 2, "partition_method": "41,42"}, 80, 4, 2),
        (QWEN2_7B, {}, 2, 14, 2),
        (QWEN3_06B, {}, 2, 4, 2),
        (QWEN3_MOE, {"model_parallel_size": 8}, 2, 8, 4),  # fewer key heads than ranks: so has the model itself
    ],
)
def test_a_shrunken_model_is_of_the_same_kind(config, flags, layers, heads, keys):
    made, mine = small(config, **flags), AutoConfig.for_model(**config)
    assert (made.num_hidden_layers, made.num_attention_heads, made.num_key_value_heads) == (layers, heads, keys)
    assert made.hidden_size == max(64, 16 * heads)
    for name in ("model_type", "vocab_size", "tie_word_embeddings", "hidden_act"):
        assert getattr(made, name) == getattr(mine, name)
    assert mine.num_hidden_layers == config["num_hidden_layers"]  # the user's own is left as it was


def test_heads_and_experts_of_other_models():
    assert small(QWEN3_06B).head_dim * 4 == 2 * small(QWEN3_06B).hidden_size  # heads wider than the model, as there
    assert small(LLAMA3_70B).head_dim * 4 == small(LLAMA3_70B).hidden_size
    experts = small(QWEN3_MOE)
    assert (experts.num_experts, experts.num_experts_per_tok, experts.moe_intermediate_size) == (4, 2, 128)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
SIZES = {**LLAMA3_70B, "pad_token_id": 0, "head_dim": 128, "attention_dropout": 0.0, "residual_dropout": 0.0}


@pytest.mark.parametrize("family", [*FAMILIES, "phi3-longrope"])
def test_shrunken_models_of_every_family_can_be_run(family):
    changes = {"rope_scaling": LONGROPE, "hidden_size": 6144} if family == "phi3-longrope" else {}
    changes |= ROUTED if family in ("dots1", "deepseek_v2") else {}
    changes |= {"head_dim": 64} if getattr(AutoConfig.for_model(family.partition("-")[0]), "kv_lora_rank", 0) else {}
    ModelSpec(small(SIZES | changes | {"model_type": family.removesuffix("-longrope")}), torch.float32)


def test_what_the_trainer_refuses_is_refused_by_the_same_sentence(tmp_path):
    for kind, said in (("bloom", "publishes no pipeline plan"), ("doge", "does between its layers")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=f"model type '{kind}' {said}"):
            parity.main(["--init", "--model", str(tmp_path / "config.json"), "--train_data", str(tmp_path)])


def outcome(seed: int = 0) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = ({name: torch.randn(8, 8, generator=generator) for name in "abc"} for _ in range(2))
    return Outcome([2.0, 1.5], [0.9, 0.8], weights, gradients, [2.1, 1.4])


def test_rounding_is_no_difference():
    run, expected = outcome(), outcome()
    run.losses[0] *= 1 + 5e-6
    run.norms[0] *= 1 + 5e-5
    run.gradients["b"] *= 1 + 5e-5
    run.weights["c"] += 5e-6
    assert faults(run, expected, 1e-3) == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: run.losses.__setitem__(1, 1.5001), "loss 2 is 1.5001 instead of 1.5"),
        (lambda run: run.losses.__setitem__(0, float("nan")), "loss 1 is nan"),
        (lambda run: run.losses.pop(), "1 times a loss instead of 2"),
        (lambda run: run.norms.__setitem__(0, 0.9003), "gradient norm 1 is"),
        (lambda run: run.evaluations.__setitem__(1, 1.41), "validation loss 2 is"),
        (lambda run: run.gradients["b"].mul_(1.01), "the gradient of b differs by 9.8e-03 of its norm"),
        (lambda run: run.weights["c"].add_(2e-4), "c: 100.00% of its values are more than 1e-05 off"),
        (lambda run: run.weights.pop("a"), "different tensors: ['a']"),
    ],
)
def test_a_difference_is_named(harm, said):
    run, expected = outcome(), outcome()
    harm(run)
    (found,) = faults(run, expected, 1e-3)
    assert said in found


@pytest.fixture
def mine(tmp_path, ragged_table):
    """A user's settings: a large model, a blend of tables, a long warm-up, a rate that hardly moves a weight."""
    (tmp_path / "config.json").write_text(
        AutoConfig.for_model(**QWEN3_06B | {"vocab_size": VOCAB}).to_json_string(False)
    )
    settings = {
        **{
            "init": True,
            "model": str(tmp_path / "config.json"),
            "train_data": f"{ragged_table}:0.7 {ragged_table}:0.3",
        },
        **{"seq_len": 64, "pipe_parallel_size": 2, "gradient_accumulation_steps": 64, "learning_rate": 1e-5},
        **{"warmup_steps": 2000, "output_dir": str(tmp_path / "precious"), "save_steps": 100},
        **{"checkpoint": str(tmp_path / "run")},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "mine.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "code"), [(0.1, 0), (0.9, 1)])
def test_the_command_tells_equal_from_different(decay, code, mine, monkeypatch, capsys, tmp_path):
    def launch(args, ranks, folder):
        """What the trainer is told differs from what the one process is told."""
        given = dataclasses.asdict(dataclasses.replace(args, weight_decay=decay))
        (folder / "settings.yaml").write_text(yaml.safe_dump(given))
        done = run_ranks(ranks, "--config", folder / "settings.yaml")
        assert done.returncode == 0, done.stderr[-3000:]

    monkeypatch.setattr(parity_run, "launch", launch)
    assert parity.main(["--config", str(mine), "--steps", "2"]) == code
    said = capsys.readouterr().out
    assert "4 ranks = data 2 x pipe 2 x sequence 1 x tensor 1" in said
    assert "largest differences, by parameter" in said
    assert ("the run is what one process does" in said) == (code == 0)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("config.json", "mine.yaml")]


@pytest.mark.parametrize(
    ("flags", "heading"), [([], "2 ranks = data 1 x pipe 2"), (["--ranks", "6"], "6 ranks = data 3")]
)
def test_ranks_of_a_settings_file_are_those_that_are_started(flags, heading, mine, monkeypatch, capsys):
    """As any flag of a file; the command line wins. Without, this layout would be tried on four."""

    def launch(args, ranks, folder):
        raise UserError(f"{ranks} would be started.")

    monkeypatch.setattr(parity_run, "launch", launch)
    mine.write_text(f"{mine.read_text()}ranks: 2\n")
    with pytest.raises(UserError, match=f"^{heading[0]} would be started"):
        parity.main(["--config", str(mine), "--steps", "1", *flags])
    assert heading in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_starts_its_ranks(mine, launch):
    done = launch("python", "-m", "fft.parity", "--config", mine, "--steps", "1", "--ranks", "2", "--seq_len", "32")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks = data 1 x pipe 2" in done.stdout
    assert not WARNINGS.search(done.stdout + done.stderr)


def test_what_is_wrong_with_texts_is_told_by_flag(tmp_path):
    """They are read by functions of the jobs' and notebooks', whose errors name parameters."""
    (tmp_path / "config.json").write_text(AutoConfig.for_model(**QWEN3_06B).to_json_string(False))
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text("{}")
    given = {"model": "config.json", "train_data": "texts.jsonl", "tokenizer": "broken"}
    flags = [word for name, file in given.items() for word in (f"--{name}", str(tmp_path / file))]
    with pytest.raises(UserError, match=f"^--tokenizer {tmp_path}/broken cannot be loaded"):
        parity.main(["--init", *flags])
