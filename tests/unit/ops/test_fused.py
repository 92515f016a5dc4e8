"""Fused operators: which modules compute with them, that nothing else changes, and how packages are called."""

import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from conftest import SMALL, VOCAB
from published import bound, signatures
from test_npu_backend import bound as bound_npu
from test_npu_backend import schemas
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.layers import pipeline_layers
from fft.models.spec import ModelSpec
from fft.ops import fused
from fft.ops.fused import FAMILIES, check_operators, fuse, fused_ops, plain_ops
from fft.training.engine import check_kernels
from fft.training.model import model_spec

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
SIZES = {
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
}
CPU = torch.device("cpu")


def model_of(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(SMALL | {"model_type": family} | SIZES.get(family, {}) | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


class Counted:
    """Operators that note which were used."""

    def __init__(self, ops):
        self.calls = []
        self.ops = replace(ops, **{name: self._counting(ops, name) for name in ("rms_norm", "rotary", "swiglu")})

    def _counting(self, ops, name):
        def call(*inputs):
            self.calls.append(name)
            return getattr(ops, name)(*inputs)

        return call


def losses(model) -> list[torch.Tensor]:
    """The loss of a batch and the gradients of all parameters."""
    ids = torch.arange(24).view(1, 24) * 7 % VOCAB
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_modules_compute_with_the_operators_and_get_the_same(family):
    plain, fused, counted = model_of(family), model_of(family), Counted(plain_ops())
    fuse(fused, counted.ops)
    for ours, theirs in zip(losses(fused), losses(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    layers = SMALL["num_hidden_layers"]
    norms = 2 + 2 * family.startswith("qwen3")  # q_norm and k_norm
    # Of three layers with experts in every second, two have a dense MLP; the other may have a shared expert.
    dense = {"qwen2_moe": 3, "qwen3_moe": 2}.get(family, layers)
    assert counted.calls.count("rms_norm") == norms * layers + 1
    assert counted.calls.count("rotary") == layers
    assert counted.calls.count("swiglu") == dense
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize(("family", "changes"), [("phi3", {"pad_token_id": 0}), ("olmo2", {"pad_token_id": 0})])
def test_other_models_are_left_as_they_are(family, changes):
    model = model_of(family, **changes)
    fuse(model, plain_ops())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_activation_keeps_its_mlp():
    model, counted = model_of("llama", hidden_act="gelu"), Counted(plain_ops())
    fuse(model, counted.ops)
    losses(model)
    assert "swiglu" not in counted.calls
    assert "rms_norm" in counted.calls


def test_fusing_one_model_leaves_others_alone():
    fuse(model_of("llama"), Counted(plain_ops()).ops)
    model = model_of("llama")
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("split", [False, True])
def test_pipeline_layers_compute_with_the_operators(split):
    counted = Counted(plain_ops())
    config = AutoConfig.for_model(**(SMALL | {"model_type": "qwen3", "head_dim": 16}))
    builder = StageBuilder(ModelSpec(config, torch.float32, seed=5, fused=counted.ops))
    activations = (torch.arange(12)[None].int(), torch.tensor([0, 5] + [12] * 11, dtype=torch.int32))
    for spec in pipeline_layers(builder, split):
        activations = spec.build()(activations)
    layers = SMALL["num_hidden_layers"]
    counts = [counted.calls.count(name) for name in ("rms_norm", "rotary", "swiglu")]
    assert counts == [4 * layers + 1, layers, layers]


def test_start_up_names_and_checks_kernels():
    config = AutoConfig.for_model(**(SMALL | {"model_type": "llama"}))
    assert check_kernels(ModelSpec(config, torch.bfloat16)) == "attention cpu"
    named = ModelSpec(config, torch.bfloat16, attention="reference", fused=plain_ops())
    assert check_kernels(named) == "attention reference, fused operators plain"
    with pytest.raises(UserError, match="--attention npu runs on npu"):
        check_kernels(ModelSpec(config, torch.bfloat16, attention="npu"))
    wrong = replace(plain_ops(), name="wrong", swiglu=lambda gate, up: gate * up)
    with pytest.raises(UserError, match="operators of wrong on cpu in bfloat16 differ from their formulas: swiglu by"):
        check_kernels(ModelSpec(config, torch.bfloat16, fused=wrong))


def test_flags_choose_kernels():
    config = AutoConfig.for_model(**(SMALL | {"model_type": "llama"}))
    spec = model_spec(TrainArguments("model", dtype="fp32", attention="reference"), config)
    assert (spec.attention, spec.fused, check_kernels(spec)) == ("reference", None, "attention reference")


def test_operators_that_fail_are_refused():
    failing = replace(plain_ops(), rotary=lambda *_: 1 / 0)
    with pytest.raises(UserError, match="fail: ZeroDivisionError: division by zero; use --fused_ops none"):
        check_operators(failing, CPU, torch.float32)


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_none_is_none(device):
    assert fused_ops(device, "none") is None


def test_a_cpu_has_none():
    assert fused_ops("cpu") is None


def test_a_gpu_that_could_have_some_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(fused, "find_spec", lambda _: None)
    assert "pip install liger-kernel" in fused.missing("cuda", "auto", "llama")
    for nothing in (("cpu", "auto", "llama"), ("cuda", "none", "llama"), ("cuda", "auto", "phi")):
        assert fused.missing(*nothing) is None
    monkeypatch.setattr(fused, "find_spec", lambda _: "there")
    assert fused.missing("cuda", "auto", "llama") is None


@pytest.fixture
def npu(monkeypatch):
    """torch_npu's operators by their documentation; every call must fit its schema."""
    plain, module = plain_ops(), types.ModuleType("torch_npu")
    published = schemas("npu_rms_norm", "npu_rotary_mul", "npu_swiglu")

    def npu_rms_norm(*args, **kwargs):
        given = bound_npu(published["npu_rms_norm"], args, kwargs)
        assert given["gamma"].dtype == given["self"].dtype
        return plain.rms_norm(given["self"], given["gamma"], given["epsilon"]), None

    def npu_rotary_mul(*args, **kwargs):
        given = bound_npu(published["npu_rotary_mul"], args, kwargs)
        x, cos, sin = given["self"], given["r1"], given["r2"]
        assert (given["rotary_mode"], given["rotate"]) == ("half", None)
        assert cos.shape == sin.shape == (1, 1, *x.shape[2:])  # 11SD for BNSD
        first, second = x.chunk(2, -1)
        return cos * x + sin * torch.cat((-second, first), -1)

    def npu_swiglu(*args, **kwargs):
        given = bound_npu(published["npu_swiglu"], args, kwargs)
        return plain.swiglu(*given["self"].chunk(2, given["dim"]))

    for function in (npu_rms_norm, npu_rotary_mul, npu_swiglu):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "torch_npu", module)


@pytest.fixture
def liger(monkeypatch):
    """Liger's functions by their documentation; every call must fit its signature."""
    plain, module = plain_ops(), types.ModuleType("liger_kernel.transformers.functional")
    published = signatures("liger.txt")

    def liger_rms_norm(*args, **kwargs):
        given = bound(published["liger_rms_norm"], args, kwargs)
        assert (given["offset"], given["casting_mode"], given["in_place"]) == (0.0, "llama", False)
        return plain.rms_norm(given["X"], given["W"], given["eps"])

    class Turned(torch.autograd.Function):
        """Where they are, and behind autograd's back, as Liger's kernel turns them."""

        @staticmethod
        def forward(ctx, q, k, cos, sin):
            ctx.save_for_backward(cos, sin)
            for x, turned in zip((q, k), plain.rotary(q, k, cos, sin), strict=True):
                x.data.copy_(turned)
            return q.view_as(q), k.view_as(k)

        @staticmethod
        def backward(ctx, dq, dk):
            cos, sin = ctx.saved_tensors
            return *plain.rotary(dq, dk, cos, -sin), None, None

    def liger_rope(*args, **kwargs):
        given = bound(published["liger_rope"], args, kwargs)
        assert (given["position_ids"], given["unsqueeze_dim"], given["rotary_dim"]) == (None, 1, None)
        return Turned.apply(*(given[name] for name in ("q", "k", "cos", "sin")))

    def liger_swiglu(*args, **kwargs):
        given = bound(published["liger_swiglu"], args, kwargs)
        return plain.swiglu(given["a"], given["b"])

    for function in (liger_rms_norm, liger_rope, liger_swiglu):
        setattr(module, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        package = types.ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)  # found, so installed
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(("package", "device"), [("npu", "npu"), ("liger", "cuda")])
def test_packages_are_called_as_published(package, device, request):
    request.getfixturevalue(package)
    ops = fused_ops(device)
    assert ops.name == package
    check_operators(ops, CPU, torch.float32)
    check_operators(ops, CPU, torch.bfloat16)
    plain, fused = model_of("qwen3"), model_of("qwen3")
    fuse(fused, ops)
    for ours, theirs in zip(losses(fused), losses(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_kept_for_a_recomputation_is_not_written_over(liger):
    """A matrix product's result is kept, and is what the rotary embedding turns: once in each pass, from the start."""
    config = AutoConfig.for_model(**(SMALL | {"model_type": "llama"}))
    results = []
    for operators, selective in ((None, False), (fused_ops("cuda"), True)):
        builder = StageBuilder(ModelSpec(config, torch.float32, seed=5, fused=operators, selective=selective))
        layers = [spec.build() for spec in pipeline_layers(builder)]
        activations = (torch.arange(12)[None].int(), torch.tensor([0, 5] + [12] * 11, dtype=torch.int32))
        for layer in layers[:-1]:
            activations = layer(activations)
        activations[0].square().sum().backward()
        results.append([activations[0].detach(), *(p.grad for layer in layers[:-1] for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
