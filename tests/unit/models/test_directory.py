"""What of a model directory is understood: its head, its tensors, its files, and what is beside them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from pipelines import build
from transformers import AutoConfig

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.directory import load_config
from fft.models.in_process import loaded, loss_by_layers, loss_by_transformers, write_random_model
from fft.models.lora import Lora
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.training.export import ModelExport
from fft.weights import hf


@pytest.fixture
def folder(tmp_path):
    write_random_model(AutoConfig.for_model("llama", **SMALL), tmp_path, 0)
    return tmp_path


def tensors(folder):
    reader = hf.WeightReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def read(folder, **given):
    """The layers of what is in a directory, as a run would build them."""
    config = load_config(str(folder), init=False)
    check_supported(config, 32)
    return build(StageBuilder(ModelSpec(config, torch.float32, **given), weights=hf.WeightReader(folder)))


@pytest.mark.parametrize("lora", [None, Lora(2, 4, ("q_proj",))])
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(lora, folder):
    change_config(folder, tie_word_embeddings=True)
    config = load_config(str(folder), init=False)
    assert not config.tie_word_embeddings
    assert load_config(str(folder), init=True, weights=False).tie_word_embeddings
    modules, run = read(folder, lora=lora)
    assert torch.equal(modules[-1].module.weight, tensors(folder)["lm_head.weight"])
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(folder)), rtol=2e-6, atol=0)


def test_a_head_that_repeats_the_embedding_is_tied(folder):
    change_config(folder, tie_word_embeddings=True)
    own = tensors(folder)
    hf.write_shard(folder, own | {"lm_head.weight": own["model.embed_tokens.weight"].clone()}, 0, 1)
    assert load_config(str(folder), init=False).tie_word_embeddings
    _, run = read(folder)
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(folder)), rtol=2e-6, atol=0)


def test_a_head_that_differs_in_its_last_row_is_its_own(folder, monkeypatch):
    monkeypatch.setattr("fft.models.directory._ROWS", 10)
    change_config(folder, tie_word_embeddings=True)
    own = tensors(folder)
    own["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
    own["lm_head.weight"][-1, -1] += 1
    hf.write_shard(folder, own, 0, 1)
    assert not load_config(str(folder), init=False).tie_word_embeddings


def test_dropout_of_heads_that_are_not_there_does_no_harm(folder):
    change_config(folder, classifier_dropout=0.1, summary_first_dropout=0.1)
    read(folder)


def test_tensors_that_the_model_has_no_place_for_are_named(folder):
    own = tensors(folder)
    hf.write_shard(folder, own | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, 0, 1)
    read(folder)  # what is computed may be there
    extra = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(3)}
    hf.write_shard(folder, own | extra, 0, 1)
    with pytest.raises(UserError, match=r"holds tensor model\.layers\.0\.self_attn\.q_proj\.bias and 2 more, for"):
        read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value, folder):
    own = tensors(folder)
    own["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    hf.write_shard(folder, own, 0, 1)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds values that are NaN"):
        read(folder)


def test_values_beyond_fp16_are_no_infinities(folder):
    own = tensors(folder)
    own["model.norm.weight"][3] = 7e4
    hf.write_shard(folder, own, 0, 1)
    config = load_config(str(folder), init=False)
    build(StageBuilder(ModelSpec(config, torch.bfloat16), weights=hf.WeightReader(folder)))
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that fp16 cannot hold: use --dtype bf16"):
        build(StageBuilder(ModelSpec(config, torch.float16), weights=hf.WeightReader(folder)))


def test_integers_where_numbers_belong_are_named(folder):
    own = tensors(folder)
    own["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    hf.write_shard(folder, own, 0, 1)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is of torch\.int64, not of floating-point"):
        read(folder)


def test_an_index_of_other_files_beside_a_single_one_is_no_choice_of_ours(folder):
    hf.write_shard(folder, tensors(folder), 0, 2)
    index = {"weight_map": dict.fromkeys(tensors(folder), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds model\.safetensors beside an model\.safetensors\.index\.json of other"):
        hf.WeightReader(folder)
    index = {"weight_map": dict.fromkeys(index["weight_map"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read(folder)


def test_an_adapter_beside_a_model_is_no_silent_matter(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter beside a model"):
        load_config(str(folder), init=False)


@pytest.mark.parametrize("mapping", [{"a": 3}, {"a": None}, {"a": ["b"]}])
def test_an_index_whose_files_are_no_names(mapping, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(UserError, match=r"index\.json is no index of safetensors files .* is no file name"):
        hf.WeightReader(tmp_path)


@pytest.mark.parametrize("new", [True, False])
def test_bin_files_of_either_format(new, folder):
    own = tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(own, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    _, run = read(folder)
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(folder)), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"step": 3}, "holds 'step', a int and no tensor"),
        ({"model": {}}, "a dict and no tensor"),
        ([1], "holds a list"),
    ],
)
def test_bin_files_that_hold_more_than_tensors(content, said, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        hf.WeightReader(tmp_path)


def test_a_config_without_architectures_gets_the_one_it_is_read_as(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    assert load_config(str(tmp_path), init=True).architectures == ["LlamaForCausalLM"]


def test_an_export_names_the_class_that_was_trained():
    spec = ModelSpec(AutoConfig.for_model("llama", **SMALL, architectures=["LlamaModel"]), torch.float32)
    plan = SimpleNamespace(config=spec.config, weights=None)
    export = ModelExport(plan, StageBuilder(spec), None, None)
    assert export._config.architectures == ["LlamaForCausalLM"]
    assert spec.config.architectures == ["LlamaModel"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"pad_token_id": 101}, "pad_token_id 101 .* is outside its vocabulary of 101"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral' .* is none of default"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": -1.0}}, "rope_theta -1.0"),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window 0 in .* must be of 1 token",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout is not supported"),
        ({"is_causal": False}, "attends to what follows"),
        ({"model_type": "starcoder2", "residual_dropout": 0.1}, "residual_dropout is not supported"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attends to what follows"),
        ({"model_type": "doge"}, "'doge' does between its layers, or within them, what is not known"),
        ({"model_type": "gemma4_text"}, "'gemma4_text' does between"),
        ({"model_type": "hrm_text"}, "'hrm_text' "),
    ],
)
def test_configs_that_are_refused(entries, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"} | entries))
    with pytest.raises(UserError, match=said):
        check_supported(load_config(str(tmp_path), init=True), 32)


def test_what_transformers_cannot_build_is_said_so():
    config = AutoConfig.for_model("llama", **(SMALL | {"intermediate_size": -3}))
    with pytest.raises(UserError, match=r"transformers cannot build a llama .*RuntimeError: .* correct it"):
        ModelSpec(config, torch.float32)
