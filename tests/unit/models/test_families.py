"""Every family that is trained, read from a directory that transformers wrote, computes what transformers computes."""

import contextlib

import pytest
import torch
from conftest import ROOT
from pipelines import build, check_gradients
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fft.checkpoint.gather_weights import whole_tensors
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import (
    balance_by_transformers,
    loaded,
    loss_by_layers,
    loss_by_transformers,
    write_random_model,
)
from fft.models.layers import canonical_buffers, canonical_parameters, decoder_half
from fft.models.recurrent import check_recurrent
from fft.models.small import small_config
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES, check_supported
from fft.models.table import config_of, has_windows
from fft.planning.activations import layer_activations
from fft.weights import hf


def written(family: str, folder, **changes):
    """A directory of random weights."""
    config = small_config(family, **changes)
    write_random_model(config, folder, 0)
    return config


def compared(config, folder):
    """Builder, layers and transformers' model of a directory, whose losses and gradients were found to be the same."""
    check_supported(config, 32)
    made = StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(folder))
    modules, run = build(made)
    model = loaded(folder)
    if made.balance is not None:
        made.balance.weight = 0.0
    loss, expected = loss_by_layers(run), loss_by_transformers(model)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    loss.backward()
    expected.backward()
    check_gradients(modules, model)
    return made, modules, model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_s_loss_and_gradients_are_those_of_transformers(family, tmp_path):
    made, modules, model = compared(written(family, tmp_path), tmp_path)
    if made.balance is not None:
        torch.testing.assert_close(
            made.balance.total / made.balance.count, balance_by_transformers(model), rtol=1e-5, atol=0
        )
    # What is written has the names and the values that were read.
    files = hf.WeightReader(tmp_path)
    written_back = whole_tensors({**canonical_parameters(modules), **canonical_buffers(modules)}, made)
    assert set(written_back) == set(files.names)
    assert all(torch.equal(written_back[name], files.tensor(name)) for name in files.names)


@pytest.mark.parametrize("family", [*filter(has_windows, FAMILIES)])
def test_windows_shorter_than_documents_are_those_of_transformers(family, tmp_path):
    config = config_of(family)
    assert config.sliding_window == 4
    write_random_model(config, tmp_path, 0)
    compared(config, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_a_layer_share_nothing_or_are_refused(family):
    for layer in ModelSpec(small_config(family), torch.float32).skeleton.base_model.layers:
        with contextlib.suppress(UserError):
            halves = [{name for name, _ in decoder_half(layer, h).named_parameters()} for h in ("attention", "mlp")]
            assert not halves[0] & halves[1]
            assert halves[0] | halves[1] == {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_compute_what_the_layer_does_or_are_refused(family, tmp_path):
    config = written(family, tmp_path)
    builder = StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(tmp_path))
    with contextlib.suppress(UserError):
        _, run = build(builder, split=True)
        torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(tmp_path)), rtol=2e-6, atol=0)


def test_halves_that_would_share_a_norm_are_refused():
    layer = ModelSpec(small_config("glm4"), torch.float32).skeleton.base_model.layers[0]
    with pytest.raises(UserError, match="Glm4DecoderLayer has post_self_attn_layernorm, post_mlp_layernorm besides"):
        decoder_half(layer, "mlp")


def test_every_model_type_is_known_or_refused_by_a_sentence():
    known = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
        except Exception:  # its own defaults are none
            continue
        with contextlib.suppress(UserError):
            check_supported(config, 64)
            known.add(kind)
    assert known <= set(FAMILIES)
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) > 150


def test_linear_attention_is_refused_where_a_row_is_shared_out():
    with pytest.raises(UserError, match=r"--sequence_parallel_size 2: model type 'qwen3_next' has linear attention"):
        check_recurrent(small_config("qwen3_next"), 2)
    check_recurrent(small_config("qwen3_next"), 1)
    check_recurrent(small_config("llama"), 2)


def test_a_hybrid_may_have_no_positions(tmp_path):
    config = written("olmo_hybrid", tmp_path, rope_parameters=None)
    check_supported(config, 32)
    _, run = build(StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(tmp_path)))
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(tmp_path)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe"])
def test_biases_that_balance_experts_stay_in_fp32(family, tmp_path):
    """A buffer of one, of the other a parameter that is never trained."""
    config = written(family, tmp_path)
    files = hf.WeightReader(tmp_path)
    made = StageBuilder(ModelSpec(config, torch.bfloat16), weights=files)
    modules, _ = build(made)
    kept = whole_tensors(canonical_buffers(modules), made)
    assert sorted(kept) == [name for name in sorted(files.names) if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(value, files.tensor(name)) for name, value in kept.items())
    assert canonical_parameters(modules)["model.norm.weight"].dtype == torch.bfloat16


def test_stored_buffers_are_read_and_written_back(tmp_path):
    config = written("apertus", tmp_path)
    reader = hf.WeightReader(tmp_path)
    changed = {name: reader.tensor(name) for name in reader.names}
    beta = "model.layers.1.mlp.act_fn.beta"
    changed[beta] = torch.tensor(0.75, dtype=changed[beta].dtype)  # not what a constructor would make
    hf.write_shard(tmp_path, changed, 0, 1)
    made = StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(tmp_path))
    modules, run = build(made)
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(tmp_path)), rtol=2e-6, atol=0)
    written_back = whole_tensors({**canonical_parameters(modules), **canonical_buffers(modules)}, made)
    assert set(written_back) == set(changed)
    assert all(torch.equal(written_back[name], value) for name, value in changed.items())


def test_halves_of_layers_have_the_buffers_of_their_modules(tmp_path):
    config = written("gemma", tmp_path)
    spec = ModelSpec(config, torch.float32)
    _, run = build(StageBuilder(spec, weights=hf.WeightReader(tmp_path)), split=True)
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(tmp_path)), rtol=2e-6, atol=0)


def test_computed_buffers_are_there_from_a_seed_too():
    modules, _ = build(StageBuilder(ModelSpec(small_config("gemma", hidden_size=64), torch.float32)))
    assert modules[0].module.embed_scale == 8


def test_routers_to_which_their_parents_give_first_values_get_them():
    modules, _ = build(StageBuilder(ModelSpec(small_config("qwen3_next", initializer_range=0.1), torch.float32)))
    for name, router in canonical_parameters(modules).items():
        if name.endswith("mlp.gate.weight"):
            assert 0.07 < router.std() < 0.13, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_every_parameter_a_value(family):
    """Memory that nobody wrote into is refused by name; none of it is in the families but for apertus' buffers."""
    spec = ModelSpec(small_config(family), torch.float32)
    with contextlib.suppress(UserError) if family == "apertus" else contextlib.nullcontext():
        modules, _ = build(StageBuilder(spec))
        assert all(parameter.isfinite().all() for parameter in modules.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_keeps_is_measured_before_it_runs(family):
    spec = ModelSpec(small_config(family), torch.float32)
    assert all(tensor.is_meta for tensor in spec.skeleton.state_dict().values())
    assert all(layer.saved > 0 for layer in layer_activations(spec, 32)[1:-1])


def test_what_nothing_fills_is_named():
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.act_fn\.alpha_p is a parameter .* start from weights"):
        build(StageBuilder(ModelSpec(small_config("apertus"), torch.float32)))


def test_building_from_files_leaves_the_caller_s_random_state_alone(tmp_path):
    config = written("gemma", tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(tmp_path)))
    assert torch.equal(torch.rand(1), expected)


def test_the_page_on_inputs_lists_all_families():
    page = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    listed = page.partition("**Configs** of these types")[2].partition("Refused of them")[0].rpartition(":")[2]
    assert listed.strip(" .\n").split() == sorted(FAMILIES)
