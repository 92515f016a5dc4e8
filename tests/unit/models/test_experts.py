"""Mixtures of experts: the balance loss against transformers', names and shapes in files, reading in parts."""

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from fft.models.experts import balance_loss
from fft.models.stored import stored_names
from fft.parallel.tensor_plan import plan_of, shard_of
from fft.weights.hf import WeightReader

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SMALL, **EXPERTS))


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    model.save_pretrained(path)
    return path


def test_balance_loss_and_its_gradient_equal_transformers():
    torch.manual_seed(0)
    logits = torch.randn(50, 4, requires_grad=True)
    values = []
    for loss in (balance_loss(logits, 2, 50), load_balancing_loss_func((logits,), 4, 2)):
        (grad,) = torch.autograd.grad(loss, logits)
        values.append((loss.detach(), grad))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_files_hold_what_transformers_writes(model, directory):
    written = load_file(directory / "model.safetensors")
    ours = stored_names(model).to_stored({name: p.detach() for name, p in model.named_parameters()})
    assert set(ours) == set(written)
    for name, value in written.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parameters_are_read_from_files_in_parts(model, directory, size):
    reader, plan, stored = WeightReader(directory), plan_of(model.config), stored_names(model)
    for name, value in model.named_parameters():
        for rank in range(size):
            shape = tuple(value.shape)
            shard = shard_of(name.removeprefix("model."), shape, plan, (4, 2), rank, size)
            expected = value if shard is None else shard.of(value)
            assert torch.equal(reader.read(name, shape, shard, stored.pieces(name)), expected), name


def test_a_stored_tensor_finds_its_place_in_the_parameter(model):
    names = stored_names(model)
    for name, value in model.named_parameters():
        for stored, piece in names.to_stored({name: value.detach()}).items():
            (use,) = names.uses(stored, tuple(piece.shape))
            start = use.start * piece[0].numel()
            assert use.parameter == name
            assert torch.equal(value.detach().flatten()[start : start + piece.numel()], piece.flatten())


def test_other_names_stay(model):
    assert stored_names(model).pieces("model.layers.0.mlp.down_proj.weight") == ()
