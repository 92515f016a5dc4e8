"""What is trained: adapters against a plain product, and what names may be given."""

import copy
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fft.checkpoint import adapter
from fft.checkpoint.conversion import Merged
from fft.data.draws import column_draws, token_draws
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.lora import Lora, LoraLinear, adapt, dropped, dropping, reset_adapter, reset_adapters, trained
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


class Thinned(nn.Module):
    """In place of PEFT's dropout: what the numbers of tokens say."""

    def __init__(self, path, draws, rate):
        super().__init__()
        self.path, self.draws, self.rate = path, draws, rate

    def forward(self, x):
        columns = torch.from_numpy(column_draws(self.path, x.shape[-1]))
        return x.masked_fill(dropped(self.draws, columns, self.rate)[None], 0) / (1 - self.rate)


KINDS = {
    "lora": Lora(2, 6, ("q_proj", "down_proj")),
    "rslora": Lora(2, 6, ("q_proj", "down_proj"), rslora=True),
    "dropout": Lora(2, 6, ("q_proj", "down_proj"), dropout=0.25),
    "dora": Lora(2, 6, ("q_proj", "down_proj"), dora=True),
    "all": Lora(2, 6, ("q_proj", "down_proj"), dropout=0.25, rslora=True, dora=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biases", [False, True])
def test_forward_and_gradients_are_those_of_peft(kind, biases):
    """With random values everywhere, in training; where something is dropped, PEFT is given the same places."""
    peft, lora = pytest.importorskip("peft"), KINDS[kind]
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(spec(attention_bias=biases, mlp_bias=biases).config).double()
    theirs = copy.deepcopy(ours)
    adapt(ours, "model.layers", lora)
    reset_adapters(ours, seed=1)
    options = {"use_rslora": lora.rslora, "use_dora": lora.dora, "lora_dropout": lora.dropout}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(lora.modules), **options)
    theirs = peft.get_peft_model(theirs, config).train()
    names = {n.removeprefix(adapter.PREFIX).replace(".default", ""): p for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if adapter.is_adapter(name.removesuffix(".weight")):
                other = names[name if name in names else f"{name}.weight"]
                start = other.clone()
                nn.init.normal_(parameter) if parameter.ndim > 1 else parameter.mul_(torch.rand_like(parameter) + 0.5)
                other.copy_(parameter)
                assert parameter.ndim > 1 or not torch.equal(start, parameter)
    ids = torch.arange(20)[None]
    draws = torch.from_numpy(token_draws(3, [7], [0], 20)).int()
    for child in dropping(ours):
        child.draws = draws
    for path, child in theirs.named_modules():
        if path.endswith(".lora_dropout") and lora.dropout:
            child["default"] = Thinned(path.removeprefix(adapter.PREFIX).removesuffix(".lora_dropout"), draws, 0.25)
    assert bool(dropping(ours)) == bool(lora.dropout)
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-7, atol=0)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            expected = names[name if name in names else f"{name}.weight"].grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6 * float(expected.norm()))


def test_lengths_begin_with_those_of_the_weights():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(spec().config)
    ids, plain = torch.arange(20)[None], model(torch.arange(20)[None]).logits
    adapt(model, "model.layers", KINDS["dora"])
    reset_adapters(model, seed=1)
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_what_is_dropped_is_as_if_drawn(rate):
    """As many of every row and column, and no structure: the largest singular value is that of independent values."""
    draws = torch.from_numpy(token_draws(0, [5, 6], [0, 512], 1024)).int()
    masks = [dropped(draws, torch.from_numpy(column_draws(name, 768)), rate).double() for name in ("a", "b")]
    deviation = (rate * (1 - rate)) ** 0.5
    for mask in masks:
        assert abs(float(mask.mean()) - rate) < 4 * deviation / mask.numel() ** 0.5
        for dim in (0, 1):
            assert float((mask.mean(dim) - rate).abs().max()) < 5 * deviation / mask.shape[dim] ** 0.5
        largest = float(torch.linalg.matrix_norm((mask - rate) / deviation, ord=2))
        assert largest < 1.05 * (1024**0.5 + 768**0.5)
    both = float(((masks[0] - rate) * (masks[1] - rate)).mean()) / deviation**2
    assert abs(both) < 4 / masks[0].numel() ** 0.5


def test_tokens_have_the_numbers_of_their_sample_and_place():
    """In whatever row they lie; other seeds and samples have others."""
    whole = token_draws(1, [4, 9], [0, 8], 16)
    assert whole.dtype == np.int64
    assert len(set(whole.tolist())) == 16
    np.testing.assert_array_equal(token_draws(1, [9], [0], 5), whole[8:13])
    np.testing.assert_array_equal(token_draws(1, [2, 4], [0, 3], 11)[3:], whole[:8])
    assert not set(token_draws(2, [4, 9], [0, 8], 16).tolist()) & set(whole.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_written(kind, tmp_path):
    """The same logits, from two ranks' parts; PEFT refuses or warns of names that it does not know."""
    peft = pytest.importorskip("peft")
    lora = KINDS[kind]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(spec().config)
    plain.save_pretrained(tmp_path / "base")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(ours, "model.layers", lora)
    reset_adapters(ours, seed=1)
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B.weight"):
            nn.init.normal_(parameter)
        elif name.endswith("lora_magnitude_vector"):
            nn.init.uniform_(parameter)
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
        read = peft.PeftModel.from_pretrained(base, output)
        theirs = read(ids).logits
        torch.testing.assert_close(theirs, ours(ids).logits)
        assert not torch.allclose(theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits, atol=0.1)
        merged = read.merge_and_unload().state_dict()
    own = Merged(hf.WeightReader(tmp_path / "base"), output)
    for name in own.names:
        torch.testing.assert_close(own.tensor(name), merged[name], rtol=1e-5, atol=1e-6)


def test_several_adapters_are_summed(tmp_path):
    """As PEFT merges them one after the other; one of DoRA has no sum with others."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(spec().config).save_pretrained(tmp_path / "base")
    for name, lora in (("a", KINDS["lora"]), ("b", Lora(3, 8, ("q_proj", "v_proj"))), ("dora", KINDS["dora"])):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapt(model, "model.layers", lora)
        reset_adapters(model, seed=1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        (tmp_path / name).mkdir()
        hf.write_shard(tmp_path / name, adapter.adapter_parameters(dict(model.named_parameters())), 0, 1)
        adapter.write_adapter(tmp_path / name, 1, adapter.adapter_config(lora, tmp_path / "base"))
    base = hf.WeightReader(tmp_path / "base")
    own = Merged(base, tmp_path / "a", None, None, tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(theirs.merge_and_unload(), tmp_path / "b").merge_and_unload().state_dict()
    for name in own.names:
        torch.testing.assert_close(own.tensor(name), theirs[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"dora is one of DoRA \(use_dora\), which has no sum with others"):
        Merged(base, tmp_path / "a", None, None, tmp_path / "dora")
    with pytest.raises(UserError, match=r"dora is one of DoRA"):  # what a run wrote is merged into its model first
        Merged(Merged(base, tmp_path / "dora"), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    for twice in (
        lambda: Merged(base, tmp_path / "a", None, None, tmp_path / "again"),
        lambda: Merged(own, tmp_path / "again"),
    ):
        with pytest.raises(UserError, match=r"a and .*again are the same adapter, which would be added twice"):
            twice()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lora": Lora(2, 4, ("q_proj", "w_pack"))}, "no decoder layer has a linear module 'w_pack'"),
        ({"lora": Lora(2, 4, ("lm_head",))}, "choose among down_proj, gate_proj, k_proj"),
        (
            {"lora": Lora(2, 4, ("q_proj", "visual.qkv"), dropout=0.1)},
            "--lora_dropout: visual.qkv of --lora_module_name sees patches",
        ),
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
