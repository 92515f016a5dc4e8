"""Conversion without a launcher: what comes out is what transformers loads from what went in."""

import copy
import json
import math
import shutil

import pytest
import torch
from conftest import SMALL
from in_process import run_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fft.checkpoint import conversion
from fft.checkpoint.adapter import is_other_base, scale_of
from fft.checkpoint.conversion import Merged
from fft.checkpoint.convert import cli, main
from fft.checkpoint.layer_files import LayerFiles
from fft.data.owner import owned
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import InProcess, write_random_model
from fft.models.small import small_config
from fft.models.spec import ModelSpec
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
def convert(tmp_path):
    """Convert to ``out``; returns what transformers loads from there, or, refused, what was said."""

    def run(source, *flags, refused=False):
        done = run_here(cli, source, tmp_path / "out", *flags)
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


def test_a_sum_that_is_written_in_fp32_was_not_rounded_before(model, tmp_path, convert):
    """The model is stored in bf16; the sum of it and its adapter has more digits."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    folder, tensors = adapter(tmp_path, TARGETS)
    merged = convert(tmp_path / "half", "--lora", folder, "--dtype", "fp32").state_dict()
    for name in TARGETS:
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        exact = half.get_submodule(name).weight.float() + 2 * up @ down
        assert merged[f"{name}.weight"].dtype == torch.float32
        torch.testing.assert_close(merged[f"{name}.weight"], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (TARGETS, {"lora_bias": True}, "only LoRA and DoRA are read, this has lora_bias"),
        (TARGETS, {"peft_type": "IA3"}, "only LoRA and DoRA are read, this has IA3"),
        ({"model.layers.9.mlp.up_proj": (64, 32)}, {}, "lora_A.weight belongs to no weight of the model"),
        (TARGETS, {"init_lora_weights": "pissa_niter_4"}, "this has init_lora_weights 'pissa_niter_4', which changes"),
    ],
)
def test_adapters_that_are_refused(names, settings, said, directory, convert, tmp_path):
    assert said in convert(directory, "--lora", adapter(tmp_path, names, **settings)[0], refused=True)


def test_of_a_folder_of_adapters_one_has_to_be_named(directory, convert, tmp_path):
    folder, _ = adapter(tmp_path, TARGETS)
    for step in (9, 10):
        shutil.copytree(folder, tmp_path / "run" / f"step-{step}")
    said = convert(directory, "--lora", tmp_path / "run", refused=True)
    assert f"run is no adapter directory, but holds some: give one of them, as {tmp_path}/run/step-10." in said


@pytest.mark.parametrize(
    ("made_for", "told"),
    [("/models/Qwen3-8B", True), ("Qwen/Qwen3-8B", True), ("org/{name}", False), ("/elsewhere/{name}", False)],
)
def test_an_adapter_of_another_base_is_told(made_for, told, directory, tmp_path, capfd):
    base = made_for.format(name=directory.resolve().name)
    folder, _ = adapter(tmp_path, TARGETS, base_model_name_or_path=base)
    main([str(directory), str(tmp_path / "out"), "--lora", str(folder)])
    note = f"note: --lora {folder} was made for {base}; it is added to {directory}"
    assert (note in capfd.readouterr().err) == told


def test_an_adapter_of_a_model_in_the_hubs_cache_is_of_that(tmp_path):
    cached = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0a1b"
    cached.mkdir(parents=True)
    assert not is_other_base("Qwen/Qwen3-8B", cached)
    assert is_other_base("Qwen/Qwen3-8B", tmp_path / "Qwen3-0.6B")


def test_what_is_refused(directory, convert, tmp_path):
    assert "is no directory" in convert(tmp_path / "none", refused=True)
    assert f"--tag step-3: {directory}/step-3 is no checkpoint; {directory} holds: none" in convert(
        directory, "--tag", "step-3", refused=True
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian", "peft_version": "0.18", "modules_to_save": None, "rank_pattern": {}}, None),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora', which changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda', which changes the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq', which changes the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga', which changes the base"),
        ({"modules_to_save": ["lm_head"]}, "this has modules_to_save"),
        ({"trainable_token_indices": [3]}, "this has trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "this has layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "this has target_parameters"),
        ({"use_bdlora": {"a": 1}}, "this has use_bdlora"),
        ({"some_invention_of_2027": 1}, "this has some_invention_of_2027"),
        ({"bias": "lora_only"}, "this has bias"),
        ({"r": 0}, "is no LoRA adapter: r is 0"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_settings_of_an_adapter_are_known_or_refused(settings, said):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    if said is None:
        assert scale_of(config, "it") == 2
    else:
        with pytest.raises(UserError, match=said):
            scale_of(config, "it")


def test_every_setting_of_peft_is_known_or_refused_when_it_is_on():
    """Of the installed release: defaults pass, and none is overlooked."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict() | {"peft_type": "LORA"}
    assert scale_of(config, "it") == 2


def merged(model, folder, tensors, **settings):
    """What comes of merging in this process."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Merged(WeightReader(model), folder)


def matrices(name, rows, columns):
    parts = {"A": torch.ones(4, columns), "B": torch.ones(rows, 4)}
    return {f"base_model.model.{name}.lora_{part}.weight": value for part, value in parts.items()}


def test_adapters_that_do_not_fit_are_named(directory, tmp_path):
    q_proj = "model.layers.0.self_attn.q_proj"
    half = dict(list(matrices(q_proj, 32, 32).items())[:1])
    with pytest.raises(UserError, match=r"lacks base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_B"):
        merged(directory, tmp_path / "half", half)
    wide = merged(directory, tmp_path / "wide", matrices(q_proj, 32, 33))
    with pytest.raises(UserError, match=r"has \(32, 33\) for .*q_proj\.weight of \(32, 32\): wrong adapter or model"):
        wide.tensor(f"{q_proj}.weight")
    with pytest.raises(UserError, match="is no matrix of plain LoRA: merge it with PEFT"):
        merged(directory, tmp_path / "other", {"base_model.model.model.norm.weight": torch.ones(2)})


def test_an_adapter_is_added_to_weights_that_files_call_otherwise(tmp_path):
    """Of a module that transformers calls shared_experts and the files shared_mlp."""
    write_random_model(small_config("hy_v3"), tmp_path / "model", 0)
    name, stored = (f"model.layers.1.mlp.{kind}.up_proj" for kind in ("shared_experts", "shared_mlp"))
    folder, reader = tmp_path / "adapter", WeightReader(tmp_path / "model")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(matrices(name, 32, 32), folder / "adapter_model.safetensors")
    with_adapter = conversion.merged(reader, folder, None, tmp_path / "model")
    torch.testing.assert_close(with_adapter.tensor(f"{stored}.weight"), reader.tensor(f"{stored}.weight") + 8)


@pytest.mark.parametrize("flags", [(), ("--lora",)])
def test_a_head_that_the_config_ties_and_the_files_do_not_is_kept(flags, model, directory, convert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if flags:
        flags = ("--lora", adapter(tmp_path, TARGETS)[0])
    loaded = convert(source, *flags)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_adapter_of_a_tied_head_is_named(convert, tmp_path):
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"tie_word_embeddings": True}))
    made.save_pretrained(tmp_path / "tied")
    said = convert(tmp_path / "tied", "--lora", adapter(tmp_path, {"lm_head": (101, 32)})[0], refused=True)
    assert "lm_head.lora_A.weight adapts the output head, which in this model is the embedding" in said


def fp8_copy(directory, source):
    """A copy of a model with one matrix in FP8; the name of that, and what it stands for."""
    shutil.copytree(directory, source)
    weights, name = load_file(source / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.tensor([[0.5, 0.25], [2.0, 1.0], [0.5, 4.0], [1.0, 1.0]])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    expected = weights[name].float() * weights[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    return name, expected


def test_fp8_is_written_multiplied_out_and_says_nothing_of_it(directory, convert, tmp_path):
    name, expected = fp8_copy(directory, tmp_path / "source")
    loaded = convert(tmp_path / "source")
    assert torch.equal(loaded.state_dict()[name], expected.to(torch.bfloat16))
    assert not hasattr(loaded.config, "quantization_config")


def test_an_adapter_is_added_to_what_fp8_stands_for(directory, tmp_path):
    name, expected = fp8_copy(directory, tmp_path / "source")
    source = merged(tmp_path / "source", tmp_path / "adapter", matrices(name.removesuffix(".weight"), 64, 32))
    assert torch.equal(source.tensor(name), expected + 8 / 4 * 4)  # the product of ones, of rank 4
    assert source.dtype == torch.bfloat16
    assert not any(stored.endswith("_scale_inv") for stored in source.names)


def test_what_would_be_lost_is_refused(directory, convert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    assert "would replace" in convert_in_place(source)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert "has no tensor model.layers.2.mlp.up_proj.weight" in convert(source, refused=True)


def convert_in_place(folder):
    with pytest.raises(UserError) as raised:
        main([str(folder), str(folder), "--overwrite"])
    return str(raised.value)


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_sizes_that_are_none(size, directory, tmp_path):
    with pytest.raises(UserError, match="must be more than 0"):
        main([str(directory), str(tmp_path / "out"), "--max_shard_size", size])


def test_an_output_that_cannot_be_made(directory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: name a folder"):
        main([str(directory), str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"cannot be made .Not a directory.: choose another folder"):
        main([str(directory), str(tmp_path / "file" / "below")])


def test_help_does_not_wait_for_torch(launch):
    """Nor does a flag that is wrong."""
    said = (
        "import sys; from fft.checkpoint import convert\n"
        "convert.build_parser().format_help(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert launch("python", "-c", said).stdout.split() == ["False", "False"]


def test_a_folder_with_checkpoints_is_no_output(directory, tmp_path):
    state = tmp_path / "run" / "step-2" / "training" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    with pytest.raises(UserError, match=r"run would replace or change the checkpoint .*step-2: choose another folder"):
        main([str(directory), str(tmp_path / "run"), "--overwrite"])


def test_an_output_that_another_writes_is_refused(directory, convert, tmp_path):
    with owned(tmp_path / ".out.owner", "out"):
        assert "out is being written by another job" in convert(directory, refused=True)
    convert(directory)


@pytest.mark.parametrize(
    ("family", "split"), [("gpt_neox", False), ("llama", False), ("llama", True), ("phi", False), ("gemma2", False)]
)
def test_layer_files_of_deepspeed_have_the_names_of_their_family(family, split, tmp_path):
    config = small_config(family)
    write_random_model(config, tmp_path, 0)
    files, spec = WeightReader(tmp_path), ModelSpec(config, torch.float32)
    for number, layer in enumerate(InProcess(StageBuilder(spec, weights=files), split).modules):
        torch.save(layer.state_dict(), tmp_path / f"layer_{number:02d}-model_states.pt")
    found = LayerFiles(tmp_path, spec)
    stored = {name: spec.stored.names(name)[0] for name in found.names}  # GPT-NeoX's head has another name in files
    assert set(stored.values()) == set(files.names)
    assert all(torch.equal(found.tensor(name), files.tensor(stored[name])) for name in found.names)


def test_what_is_no_number_is_written_and_told(model, directory, tmp_path):
    tensors = load_file(directory / "model.safetensors")
    shutil.copytree(directory, tmp_path / "in")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -math.inf
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    done = run_here(cli, tmp_path / "in", tmp_path / "out", "--max_shard_size=1e-5")
    assert done.returncode == 0, done.stderr
    assert "warning: model.layers.1.mlp.up_proj.weight holds NaN or infinity, as 1 more tensors do: " in done.stderr
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    assert "warning" not in run_here(cli, directory, tmp_path / "fine").stderr
