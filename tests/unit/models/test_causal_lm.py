"""The model as pipeline layers: any cut, tied or not, packed or not, computes what transformers computes."""

import itertools

import pytest
import torch
from conftest import SMALL, VOCAB
from pipelines import build, check_gradients
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import loss_by_layers, loss_by_transformers
from fft.models.layers import canonical_parameters, pipeline_layers
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.ops.fused import plain_ops
from fft.weights.hf import WeightReader

FAMILIES = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
}


def spec(family="llama", dtype=torch.float32, options=None, **changes) -> ModelSpec:
    given = SMALL | {"model_type": family} | FAMILIES[family] | changes
    return ModelSpec(AutoConfig.for_model(**given), dtype, **{"seed": 5, **(options or {})})


def builder(family="llama", weights=None, options=None, **changes) -> StageBuilder:
    return StageBuilder(spec(family, options=options, **changes), weights=weights)


def plain_model(config, modules):
    """The same weights in transformers' own model."""
    config = AutoConfig.for_model(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing = model.load_state_dict(canonical_parameters(modules), strict=False).missing_keys
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_and_gradients_equal_transformers(family, split):
    if split and family == "olmo2":
        with pytest.raises(UserError, match="--split_dlayer: Olmo2DecoderLayer has no input_layernorm"):
            build(builder(family), split)
        return
    made = builder(family)
    modules, run = build(made, split)
    model = plain_model(made.spec.config, modules)
    loss, expected = loss_by_layers(run), loss_by_transformers(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    check_gradients(modules, model)


ROTARY = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    # Up to these lengths they do not depend on the batch's longest document.
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scaling_is_the_config_s(kind):
    """Of packed documents, each as transformers computes it alone; with the spelling of older config files."""
    made = builder(rope_theta=100.0, rope_scaling={"rope_type": kind, **ROTARY[kind]})
    check_supported(made.spec.config, 32)
    assert made.spec.config.rope_parameters["rope_theta"] == 100
    modules, run = build(made)
    model = plain_model(made.spec.config, modules)
    torch.manual_seed(0)
    ids, bounds = torch.randint(VOCAB, (1, 40)), [0, 5, 6, 17, 40]
    hidden, weight = run(ids, bounds)
    logits = hidden @ weight.T
    for a, b in itertools.pairwise(bounds):
        torch.testing.assert_close(logits[a:b], model(ids[:, a:b]).logits[0], rtol=1e-5, atol=1e-5)
    if kind != "dynamic":
        _, run = build(builder(rope_theta=100.0))
        assert (run(ids, bounds)[0] - hidden).abs().max() > 1e-3  # scaling was at work


def test_layers_attend_with_the_kernel_asked_for():
    _, run = build(builder(options={"attention": "cuda"}))
    with pytest.raises(UserError, match="--attention cuda runs on cuda in bfloat16 or float16, not on cpu in float32"):
        run(torch.zeros(1, 4), [0, 4])


@pytest.mark.parametrize(("split", "count"), [(False, 3 + SMALL["num_hidden_layers"]), (True, 3 + 6)])
def test_number_of_layers(split, count):
    assert len(pipeline_layers(builder(), split)) == count


def test_initial_weights_follow_seed_and_name():
    first, again, other = (canonical_parameters(build(builder(options={"seed": seed}))[0]) for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert value.ndim < 2 or not torch.equal(value, other[name])


def test_building_a_layer_leaves_the_caller_s_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(builder())
    assert torch.equal(torch.rand(1), expected)


def test_what_is_built_leaves_the_spec_and_the_caller_s_config_as_they_were():
    config = AutoConfig.for_model(**(SMALL | {"model_type": "qwen3", "tie_word_embeddings": True}))
    before = config.to_json_string()
    made = StageBuilder(ModelSpec(config, torch.bfloat16, fused=plain_ops()))
    build(made)
    first, again = (canonical_parameters(build(made)[0]) for _ in range(2))
    assert all(p.is_meta for p in made.spec.skeleton.parameters())
    assert config.to_json_string() == before
    assert all(torch.equal(again[name], p) and again[name] is not p for name, p in first.items())


def test_weights_are_read_by_name(tmp_path):
    model = plain_model(spec().config, build(builder(options={"seed": 9}))[0])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    read = canonical_parameters(build(builder(weights=WeightReader(tmp_path)))[0])
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path):
    state = plain_model(spec().config, build(builder())[0]).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: state[name][:, 1:].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor {name} has shape \(64, 31\), config\.json implies \(64, 32\)"):
        build(builder(weights=WeightReader(tmp_path)))
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        build(builder(weights=WeightReader(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "publishes no pipeline plan"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 .* more than 0, or null"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "means nothing to model type 'gemma3_text",
        ),
        ({"model_type": "gemma3_text", "final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0 .* more than 0"),
        ({"model_type": "llama", "final_logit_softcapping": 30.0}, "caps outside its layers .final_logit_softcapping"),
        ({"model_type": "llama", "logit_scale": 0.5}, "'llama' scales or caps outside its layers .logit_scale 0.5"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling 0 .* must be numbers other than 0"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise is not supported"),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 32,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            },
            "rotary scaling of type 'dynamic', .* beyond 32 tokens: use --seq_len 32 or less",
        ),
        (
            {
                "model_type": "llama",
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "original_max_position_embeddings": 16,
                },
            },
            "rotary scaling of type 'longrope', .* beyond 16 tokens: use --seq_len 16 or less",
        ),
    ],
)
def test_models_of_another_make_are_refused(changes, sentence):
    config = AutoConfig.for_model(**(SMALL | changes))
    with pytest.raises(UserError, match=sentence):
        check_supported(config, 64)


def test_a_window_no_shorter_than_a_sample_does_no_harm():
    check_supported(AutoConfig.for_model(**(SMALL | {"model_type": "mistral", "sliding_window": 64})), 64)
