"""Conversion without a launcher: what comes out is what transformers loads from what went in."""

import copy
import json

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fft.weights.hf import WeightReader


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(2)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    made.generation_config.eos_token_id = [7, 9]
    made.save_pretrained(tmp_path_factory.mktemp("model") / "hf")
    return made


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "hf"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def convert(launch, tmp_path):
    """Convert to ``out``; returns what transformers loads from there, or, refused, what was said."""

    def run(source, *flags, refused=False):
        done = launch("python", "-m", "fft.checkpoint.convert", source, tmp_path / "out", *flags)
        if refused:
            assert done.returncode == 2, done.stderr
            assert not (tmp_path / "out").exists()
            return done.stderr
        assert done.returncode == 0, done.stderr
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return loaded

    return run


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_shards_hold_what_one_file_held(model, directory, convert, tmp_path):
    assert same(convert(directory, "--max_shard_size", "2e-5"), model)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert all(sum(t.nbytes for t in load_file(s).values()) <= max(2e4, largest) for s in shards)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [7, 9]


def test_another_type(model, directory, convert, tmp_path):
    assert same(convert(directory, "--dtype", "bf16"), copy.deepcopy(model).to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True])
def test_bin_files(tied, convert, tmp_path):
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"tie_word_embeddings": tied}))
    old = tmp_path / "old"
    made.config.save_pretrained(old)
    state = made.state_dict()
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(state.items())[i::2]) for i in range(2)}
    for file, tensors in parts.items():
        torch.save(tensors, old / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, value in state.items():
        assert torch.equal(WeightReader(old).read(name, value.shape), value)
    loaded = convert(old)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_a_bin_file_that_is_none_is_named(directory, convert, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((directory / "config.json").read_text())
    (old / "pytorch_model.bin").write_bytes(b"version https://git-lfs")
    assert f"{old}/pytorch_model.bin is no readable file of weights" in convert(old, refused=True)


def adapter(tmp_path, names, **settings):
    """A LoRA adapter for some of a model's matrices, as PEFT lays it out."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, (rows, columns) in names.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


TARGETS = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.2.mlp.down_proj": (32, 64)}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_a_merged_adapter_computes_what_both_compute(rslora, scale, model, directory, convert, tmp_path):
    """Against forward hooks that add B(A(x)) to the output of each adapted layer."""
    folder, tensors = adapter(tmp_path, TARGETS, use_rslora=rslora)
    ids = torch.arange(20)[None] % 101
    hooks = []
    for name in TARGETS:
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        hook = lambda _, inputs, output, a=down, b=up: output + scale * (inputs[0] @ a.T @ b.T)  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        plain, merged = model(ids).logits, convert(directory, "--lora", folder)(ids).logits
    assert not torch.allclose(plain, expected, atol=1e-1)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (TARGETS, {"use_dora": True}, "only plain LoRA is merged, this has use_dora"),
        (TARGETS, {"peft_type": "IA3"}, "only plain LoRA is merged, this has IA3"),
        ({"model.layers.9.mlp.up_proj": (64, 32)}, {}, "lora_A.weight belongs to no weight of the model"),
    ],
)
def test_adapters_that_are_refused(names, settings, said, directory, convert, tmp_path):
    assert said in convert(directory, "--lora", adapter(tmp_path, names, **settings)[0], refused=True)


def test_what_is_refused(directory, convert, tmp_path):
    assert "is no directory" in convert(tmp_path / "none", refused=True)
    assert f"--tag step-3: {directory}/step-3 is no checkpoint; {directory} holds: none" in convert(
        directory, "--tag", "step-3", refused=True
    )
