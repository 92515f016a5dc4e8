"""Models that see images: what of them is accepted, where their parts are, and what their files call them."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, small_config

from fft.checkpoint import adapter
from fft.checkpoint.conversion import Merged
from fft.errors import UserError
from fft.images.rules import ImageRules
from fft.models.directory import check_tensors, load_config, stored_in
from fft.models.lora import Lora, LoraLinear, adapt, adapted, reset_adapters
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.models.vision import decoder_path, vision_parts
from fft.serve.server import lora_settings
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


IMAGE = [1, 2, 152, 151, 151, 151, 151, 153, 3, 4]


@pytest.mark.parametrize(
    ("family", "names", "targets"),
    [
        ("internvl", "q_proj,down_proj", 2),
        ("internvl", "q_proj,vision_tower.q_proj,vision_tower.fc2,multi_modal_projector.linear_2", 4),
        ("qwen3_vl", "visual.qkv,visual.linear_fc1", 4),
        ("qwen2_vl", "visual.0,visual.proj,o_proj", 3),
    ],
)
def test_adapters_are_where_their_names_say(family, names, targets, tmp_path):
    """PEFT wraps what was trained and nothing else, also where tower and decoder call their layers alike; it and the
    merged model give our logits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config, lora = small_config(family), Lora(2, 6, tuple(names.split(",")))
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    ours, base = (AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval() for _ in range(2))
    adapt(ours, f"{decoder_path(ours)}.layers", lora, vision_parts(ours))
    reset_adapters(ours, seed=1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_()
    (tmp_path / "adapter").mkdir()
    write_shard(tmp_path / "adapter", adapter.adapter_parameters(dict(ours.named_parameters())), 0, 1)
    facts = adapter.adapter_config(lora, tmp_path / "base", adapted(ours))
    assert len(facts["target_modules"].split("|")) == targets
    adapter.write_adapter(tmp_path / "adapter", 1, facts)
    served = lora_settings(str(tmp_path / "base"), [f"poet={tmp_path / 'adapter'}"], set())
    assert ("enable-tower-connector-lora" in served) == ("." in names)
    inputs = {"input_ids": torch.tensor([IMAGE]), "pixel_values": torch.randn(1, 3, 16, 16)}
    if family != "internvl":
        inputs |= {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 151).int()
    merged = Merged(WeightReader(tmp_path / "base"), tmp_path / "adapter", stored=stored_in(tmp_path / "base"))
    write_shard(tmp_path, {name: merged.tensor(name) for name in merged.names}, 0, 1)
    config.save_pretrained(tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        expected, plain = ours(**inputs).logits, base(**inputs).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        wrapped = {name for name, _ in theirs.named_parameters() if "lora_" in name}
        assert len(wrapped) == len(adapter.adapter_parameters(dict(ours.named_parameters())))
        torch.testing.assert_close(theirs(**inputs).logits, expected)
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(whole(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_adapters_of_a_tower_that_is_not_trained_are_refused():
    config, lora = small_config("qwen3_vl"), Lora(2, 4, ("q_proj", "visual.qkv"))
    with pytest.raises(UserError, match=r"nothing that is trained has a linear module 'visual.qkv': choose among down"):
        ModelSpec(config, torch.float32, lora=lora)
    rules = ImageRules("qwen3_vl", 4, 2, 2, 151, 152, 153)
    made = ModelSpec(config, torch.float32, lora=lora, images=rules)
    assert sum(isinstance(module, LoraLinear) for module in made.skeleton.modules()) == 3 + 4
    with pytest.raises(
        UserError, match=r"'visual.k': choose among .*, visual.linear_fc1, visual.linear_fc2, visual.pr"
    ):
        ModelSpec(config, torch.float32, lora=Lora(2, 4, ("visual.k",)), images=rules)


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
