"""The promised families, from directories as published, compute what their descriptions say; and back."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from original_models import FAMILIES, V, write_original
from pipelines import build
from safetensors.torch import save_file
from torch.nn import functional as F

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.directory import check_whole, load_config
from fft.models.in_process import BOUNDS, documents
from fft.models.layers import canonical_parameters
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.ops.cross_entropy import linear_cross_entropy
from fft.parallel.tensor_plan import Shard
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import check_model
from fft.weights.hf import WeightReader


def made(folder, dtype=torch.float32):
    config = load_config(str(folder), init=False)
    check_supported(config, 32)
    reader = WeightReader(folder)
    check_whole(config, reader.names, folder)
    return StageBuilder(ModelSpec(config, dtype), weights=reader)


def expected_logits(family, weights):
    ids, _ = documents(V)
    return torch.cat([family.forward(weights, ids[0, a:b], family.config) for a, b in pairwise(BOUNDS)])


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_description(tmp_path, name, binary):
    family = FAMILIES[name]
    weights = write_original(tmp_path, family, binary)
    _, run = build(made(tmp_path))
    hidden, head = run(documents(V)[0], BOUNDS)
    expected = expected_logits(family, weights)
    assert expected.abs().max() > 1
    torch.testing.assert_close((hidden @ head.T).double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_description(tmp_path, name):
    family, (_, labels) = FAMILIES[name], documents(V)
    weights = {key: value.requires_grad_() for key, value in write_original(tmp_path / "model", family).items()}
    modules, run = build(made(tmp_path / "model"))
    loss = linear_cross_entropy(*run(documents(V)[0], BOUNDS), labels)
    loss.backward()
    expected = F.cross_entropy(expected_logits(family, weights), labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    expected.backward()
    # In files of the same form they are read as the weights are.
    (tmp_path / "gradients").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "gradients")
    save_file({key: value.grad.float() for key, value in weights.items()}, tmp_path / "gradients" / "model.safetensors")
    theirs = made(tmp_path / "gradients")
    for key, parameter in canonical_parameters(modules).items():
        wanted = theirs._weights.read(key, tuple(parameter.shape), None, theirs.spec.stored.pieces(key))
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("split", ["columns", "rows", "both"])
def test_parts_of_parameters_are_those_of_the_whole(tmp_path, split):
    family = FAMILIES["internlm2"]
    write_original(tmp_path, family)
    reader = WeightReader(tmp_path)
    for name in reader.names:
        whole = reader.tensor(name)
        shards = [Shard(tuple(whole.shape), whole.ndim - 1, ((3, 9), (20, 31)))] if split != "rows" else []
        shards += [Shard(tuple(whole.shape), 0, ((5, 19), (30, 32)))] if split != "columns" else []
        for shard in shards:
            torch.testing.assert_close(reader.tensor(name, tuple(whole.shape), shard), shard.of(whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qwen", "baichuan2-13b"])
def test_what_vllm_has_not_is_left_to_transformers(tmp_path, monkeypatch, name):
    save_tokenizer(train_tokenizer(["ab"], 258), tmp_path / "model")
    write_original(tmp_path / "model", FAMILIES[name], vocabulary=300)
    monkeypatch.setattr("fft.serve.engines.checked._has_vllm", lambda: True)
    assert check_model(str(tmp_path / "model")).engine == "transformers"
    for_vllm = {"options": EngineOptions(name="vllm")}, {"for_vllm": True}
    for asked in for_vllm:
        with pytest.raises(UserError, match="is none that vLLM has: use --engine transformers"):
            check_model(str(tmp_path / "model"), **asked)


REFUSED = {
    "rotary_pct is 0.5": ("qwen", {"rotary_pct": 0.5}),
    "kv_channels is 32": ("qwen", {"kv_channels": 32}),
    "and this is a model of images": ("qwen", {"visual": {"layers": 48}}),
    "and this is InternLM2ForRewardModel": ("internlm2", {"architectures": ["InternLM2ForRewardModel"]}),
    "emb_dropout_prob is not supported": ("qwen", {"emb_dropout_prob": 0.1}),
    "attn_dropout_prob is not supported": ("qwen", {"attn_dropout_prob": 0.1}),
    "z_loss_weight 0.001 is not trained with": ("baichuan2-13b", {"z_loss_weight": 0.001}),
    "not a model configuration .*num_attention_heads": ("qwen", {"num_attention_heads": None}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_another_model_is_refused(tmp_path, what):
    name, change = REFUSED[what]
    file = tmp_path / "config.json"
    config = {key: value for key, value in (FAMILIES[name].config | change).items() if value is not None}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=what):
        check_supported(load_config(str(file), init=True), 32)


def test_alibi_is_exact_only_so_far(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FAMILIES["baichuan-13b"].config))
    config = load_config(str(file), init=True)
    check_supported(config, 65536)
    with pytest.raises(UserError, match="use --seq_len 65536 or less"):
        check_supported(config, 65537)


def test_weights_beside_a_config_without_sizes_are_refused(tmp_path):
    write_original(tmp_path, FAMILIES["internlm2"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internlm2", "hidden_size": 64}))
    with pytest.raises(UserError, match="does not say of what sizes it is"):
        WeightReader(tmp_path)
