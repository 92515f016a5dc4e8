"""Adapters to go on with: PEFT's own, read as PEFT reads them; what is not understood is refused."""

import json
import re

import pytest
import torch
from conftest import SMALL
from pipelines import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint.adapter import CONFIG, PREFIX, AdapterReader
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import loss_by_layers, loss_by_transformers
from fft.models.layers import canonical_parameters
from fft.models.lora import Lora
from fft.models.spec import ModelSpec
from fft.planning.start_adapter import told_start, with_adapter
from fft.weights.hf import WeightReader

peft = pytest.importorskip("peft")

BASE = ["--train_data", "t", "--output_dir", "o"]
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def settings(**changes):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **changes})


@pytest.fixture
def save(tmp_path):
    """A model, and an adapter of it with random values, which PEFT saves; flags that name both."""

    def made(**changes):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(model, settings(**changes))
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data.mul_(1.5)
            elif parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / "adapter")
        return ["--model", str(tmp_path / "base"), "--adapter_name_or_path", str(tmp_path / "adapter"), *BASE]

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_flags_and_values_are_those_of_peft(kind, save, tmp_path):
    flags = save(**KINDS[kind])
    args = with_adapter(parse_arguments(flags))
    assert (args.lora_dim, args.lora_alpha, args.lora_module_name) == (3, 12, "down_proj,q_proj")
    assert (args.use_rslora, args.use_dora) == (kind == "rslora", kind == "dora")
    assert with_adapter(parse_arguments([*flags, "--lora_module_name", "q_proj, down_proj", "--lora_dim", "3"])) == (
        parse_arguments(
            [
                *flags,
                *("--lora_module_name", "q_proj, down_proj", "--lora_dim", "3", "--lora_alpha", "12"),
                *[f"--use_{kind}"] * bool(KINDS[kind]),
            ]
        )
    )
    said = told_start(args)
    assert said.startswith(
        f"goes on with the adapter in {tmp_path / 'adapter'}: {'DoRA' if kind == 'dora' else 'LoRA'}"
    )
    assert said.endswith(
        f"of rank 3, multiplied by {12 / 3 ** (0.5 if kind == 'rslora' else 1):.3g}, on down_proj, "
        f"q_proj; made for {tmp_path / 'base'}"
    )

    base = WeightReader(tmp_path / "base")
    spec = ModelSpec(AutoConfig.for_model("llama", **SMALL), torch.float32, lora=Lora.of(args))
    modules, run = build(StageBuilder(spec, weights=base, adapter=AdapterReader(tmp_path / "adapter")))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    )
    expected, ours = loss_by_transformers(theirs), loss_by_layers(run)
    with theirs.disable_adapter():
        assert not torch.isclose(expected, loss_by_transformers(theirs), rtol=1e-3)
    torch.testing.assert_close(ours, expected)
    expected.backward()
    ours.backward()
    names = {n.removeprefix(PREFIX).replace(".default", ""): p for n, p in theirs.named_parameters()}
    for name, parameter in canonical_parameters(modules).items():
        if parameter.requires_grad:
            other = names[name if name in names else f"{name}.weight"]
            torch.testing.assert_close(parameter, other)
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.norm()))


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({}, ["--lora_dim", "4"], "--lora_dim 4: --adapter_name_or_path .* has 3; leave the flag out"),
        ({}, ["--lora_alpha", "4"], "--lora_alpha 4: .* has 12"),
        ({}, ["--lora_module_name", "q_proj"], "--lora_module_name q_proj: .* has down_proj,q_proj"),
        ({}, ["--use_rslora"], "--use_rslora True: .* has False"),
        ({"lora_alpha": 2.5}, [], "has a lora_alpha of 2.5, which is no whole number"),
        ({"bias": "all"}, [], "only LoRA and DoRA are read, this has bias"),
        ({"modules_to_save": ["lm_head"]}, [], "this has modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, [], "this has rank_pattern"),
        ({"init_lora_weights": "olora"}, [], "init_lora_weights 'olora', which changes the base"),
    ],
)
def test_what_is_refused(changes, flags, sentence, save):
    given = save(**changes)
    with pytest.raises(UserError, match=sentence):
        with_adapter(parse_arguments([*given, *flags]))


def begun(args, tmp_path):
    spec = ModelSpec(AutoConfig.for_model("llama", **SMALL), torch.float32, lora=Lora.of(args))
    return StageBuilder(spec, adapter=AdapterReader(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers_to_transform": [0]}, r"adapter has no model\.layers\.1\..*lora_A.weight: an adapter is trained that"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no decoder layer has a linear module 'lm_head'"),
        ({"target_modules": r".*(layers.0.mlp.down_proj|q_proj)"}, r"has no model\.layers\.1\.mlp\.down_proj"),
    ],
)
def test_adapters_of_other_places_are_refused(changes, sentence, save, tmp_path):
    args = with_adapter(parse_arguments(save(**changes)))
    with pytest.raises(UserError, match=sentence):
        begun(args, tmp_path)


def test_matrices_that_nothing_takes_are_refused(save, tmp_path):
    args = with_adapter(parse_arguments(save(use_dora=True)))
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text()) | {"use_dora": False}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    args = with_adapter(parse_arguments(["--model", "m", "--adapter_name_or_path", args.adapter_name_or_path, *BASE]))
    with pytest.raises(UserError, match="lora_magnitude_vector, which is no matrix of an adapter of this model's"):
        begun(args, tmp_path)


def test_places_that_are_no_adapters(tmp_path):
    for place, sentence in (
        ("none", "is no directory: give one that PEFT or a run saved"),
        ("x" * 300, "is no directory"),
        ("", "no adapter directory"),
    ):
        flags = ["--model", "m", "--adapter_name_or_path", str(tmp_path / place), *BASE]
        with pytest.raises(UserError, match=re.escape(sentence)):
            with_adapter(parse_arguments(flags))


@pytest.mark.parametrize("more", [["--init"], ["--freeze", "norm"]])
def test_it_needs_weights_that_are_frozen(more):
    with pytest.raises(UserError, match="--adapter_name_or_path trains adapters of an existing model alone"):
        parse_arguments(["--model", "m", "--adapter_name_or_path", "a", *BASE, *more])
