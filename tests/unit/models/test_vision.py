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


@pytest.fixture(params=FAMILIES)
def config(request):
    return small_config(request.param)


def test_files_hold_what_transformers_writes(config, tmp_path):
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    spec = ModelSpec(config, torch.float32)
    assert {stored for name in spec.skeleton.state_dict() for stored in spec.stored.names(name)} == written
    check_tensors(spec, written, tmp_path)


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
