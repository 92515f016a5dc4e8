"""What is trained: adapters against a plain product, and what names may be given."""

import warnings

import pytest
import torch
from conftest import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fft.checkpoint import adapter
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.lora import Lora, LoraLinear, adapt, reset_adapter, reset_adapters, trained
from fft.models.spec import ModelSpec
from fft.train_arguments import LORA_MODULES
from fft.weights import hf

DEFAULT = tuple(LORA_MODULES.split(","))


def spec(lora=None, frozen=None, **changes) -> ModelSpec:
    config = AutoConfig.for_model(**(SMALL | {"model_type": "llama"} | changes))
    return ModelSpec(config, torch.float32, lora=lora, frozen=frozen)


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_adds_its_product(bias):
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias=bias)
    adapted, x = LoraLinear(linear, Lora(2, 6, ())), torch.randn(3, 5)
    reset_adapter("layers.0.lora_A", adapted.lora_A)
    reset_adapter("layers.0.lora_B", adapted.lora_B)
    assert torch.equal(adapted(x), linear(x))  # at the start, the model is as it was
    nn.init.normal_(adapted.lora_B.weight)
    weight = linear.weight + 6 / 2 * adapted.lora_B.weight @ adapted.lora_A.weight
    torch.testing.assert_close(adapted(x), nn.functional.linear(x, weight, linear.bias))


def test_adapters_alone_are_trained():
    made = spec(Lora(2, 4, DEFAULT))
    names = {name for name, p in made.skeleton.named_parameters() if p.requires_grad}
    assert len(names) == 2 * len(DEFAULT) * SMALL["num_hidden_layers"]
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    layer = StageBuilder(made).build("model.layers.1")
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")
    }


def test_frozen_by_pattern():
    made = spec(frozen=r"embed_tokens, layers\.[01]\.")
    frozen = {name for name, p in made.skeleton.named_parameters() if not p.requires_grad}
    expected = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
    assert frozen == {name for name, _ in made.skeleton.named_parameters() if name.startswith(expected)}
    assert 0 < trained(made.skeleton.parameters()) < sum(p.numel() for p in made.skeleton.parameters())


def test_peft_reads_what_is_written(tmp_path):
    """The same logits, from two ranks' parts; PEFT refuses or warns of names that it does not know."""
    peft = pytest.importorskip("peft")
    lora = Lora(2, 6, ("q_proj", "down_proj"))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(spec().config)
    plain.save_pretrained(tmp_path / "base")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(ours, "model.layers", lora)
    reset_adapters(ours, seed=1)
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B.weight"):
            nn.init.normal_(parameter)
    tensors = adapter.adapter_parameters(dict(ours.named_parameters()))
    output = tmp_path / "adapter"
    output.mkdir()
    for rank in range(2):
        hf.write_shard(output, dict(list(tensors.items())[rank::2]), rank, 2)
    adapter.write_adapter(output, 2, adapter.adapter_config(lora, tmp_path / "base"))
    assert {path.name for path in output.iterdir()} == {adapter.WEIGHTS, adapter.CONFIG}
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(base, output)(ids).logits
        torch.testing.assert_close(theirs, ours(ids).logits)
        assert not torch.allclose(theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits, atol=0.1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lora": Lora(2, 4, ("q_proj", "w_pack"))}, "no decoder layer has a linear module 'w_pack'"),
        ({"lora": Lora(2, 4, ("lm_head",))}, "choose among down_proj, gate_proj, k_proj"),
        ({"frozen": "embed_tokens,layer_norm"}, "'layer_norm' is in no parameter's name; there are lm_head.weight"),
        ({"frozen": "(norm"}, "is no regular expression"),
        ({"frozen": "weight"}, "leaves nothing to train"),
    ],
)
def test_what_is_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        spec(**given)


def test_of_the_default_names_a_model_need_not_have_all():
    moe = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    made = spec(Lora(2, 4, DEFAULT), head_dim=16, **moe)
    adapted = {name.rpartition(".")[2] for name, m in made.skeleton.named_modules() if isinstance(m, LoraLinear)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
