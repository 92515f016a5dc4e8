"""Models that see images: what of them is accepted, where their parts are, and what their files call them."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, small_config

from fft.errors import UserError
from fft.models.directory import check_tensors, load_config
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.weights.hf import WeightReader, write_shard
from fft.weights.names import put


@pytest.fixture(params=(*FAMILIES, "qwen3_vl_moe"))
def config(request):
    return small_config(request.param)


def test_files_hold_what_transformers_writes(config, tmp_path):
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    spec = ModelSpec(config, torch.float32)
    assert {stored for name in spec.skeleton.state_dict() for stored in spec.stored.names(name)} == written
    check_tensors(spec, written, tmp_path)


@pytest.mark.parametrize("hub", [True, False], ids=["as on the Hub", "as transformers writes"])
def test_experts_are_read_however_files_hold_them(hub, tmp_path):
    """Files on the Hub, which vLLM expects, have rows and columns of experts swapped; ours do, and transformers reads
    them."""
    config, experts = small_config("qwen3_vl_moe"), "model.language_model.layers.0.mlp.experts.gate_up_proj"
    model = AutoModelForImageTextToText.from_config(config)
    state, spec = model.state_dict(), ModelSpec(config, torch.float32)
    if hub:
        stored = spec.stored.to_stored(state)
        assert stored[experts].shape == (4, 64, 96)
        write_shard(tmp_path, stored, 0, 1)
        config.save_pretrained(tmp_path)
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in state.items())
    else:
        model.save_pretrained(tmp_path)
    reader = WeightReader(tmp_path)
    for places in [(0, 1, (0, 1)), *[(rank, 2, (expert, 2)) for rank in range(2) for expert in range(2)]]:
        shards = spec.shards(*places)
        assert experts in shards or places[1] == 1
        for name, value in state.items():
            shard = shards.get(name)
            expected = value if shard is None else shard.of(value)
            assert torch.equal(reader.read(name, value.shape, shard, spec.stored.pieces(name)), expected), name
    for name in (experts, experts.replace("gate_up", "down")):
        value = reader.tensor(name)
        (use,) = spec.stored.uses(name, tuple(value.shape))
        whole = torch.empty_like(value)
        put(whole, use, state[name].flatten())
        assert torch.equal(whole, value)


def test_square_experts_are_refused():
    config = small_config("qwen3_vl_moe")
    config.text_config.moe_intermediate_size = 64
    with pytest.raises(UserError, match=r"experts.down_proj has as many rows as columns, 64"):
        _ = ModelSpec(config, torch.float32).stored


def test_the_parts_of_a_model_are_all_of_it(config):
    check_supported(config, seq_len=64)
    spec = ModelSpec(config, torch.float32)
    places = (*spec.apart, spec.base, spec.output)
    assert all(name.startswith(places) for name in spec.skeleton.state_dict())
    assert spec.text.num_hidden_layers == len(spec.skeleton.get_submodule(f"{spec.base}.layers"))
    assert not ModelSpec(config, torch.float32, images=True).apart


@pytest.mark.parametrize(
    ("part", "key", "value", "sentence"),
    [
        ("vision_config", "hidden_dropout_prob", 0.1, "hidden_dropout_prob is not supported"),
        ("vision_config", "hidden_act", "nonsense", "hidden_act 'nonsense' in vision_config"),
        (None, "vision_feature_layer", -2, "vision_feature_layer -2"),
        ("text_config", "attention_dropout", 0.1, "attention_dropout is not supported"),
    ],
)
def test_what_a_tower_does_otherwise_is_refused(tmp_path, part, key, value, sentence):
    facts = json.loads(small_config("internvl").to_json_string())
    (facts if part is None else facts[part])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=sentence):
        check_supported(load_config(str(tmp_path / "config.json"), init=True), seq_len=64)


def test_a_tied_head_is_told_by_the_whole_config(tmp_path):
    config = small_config("qwen2_vl")
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    read = load_config(str(tmp_path), init=True)
    assert ModelSpec(read, torch.float32).tied
    assert read.architectures == ["Qwen2VLForConditionalGeneration"]
