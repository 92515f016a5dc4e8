"""A base in four bits: losses and gradients of adapters as transformers and PEFT have them, and what stays as it is."""

import re
import sys

import pytest
import torch
from conftest import SMALL
from pipelines import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from fft.arguments import parse_arguments
from fft.checkpoint.adapter import PREFIX, AdapterReader
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.four_bits import FrozenLinear, check_blocks
from fft.models.in_process import loss_by_layers, loss_by_transformers, write_random_model
from fft.models.layers import canonical_parameters
from fft.models.lora import Lora
from fft.models.small import small_config
from fft.models.spec import ModelSpec
from fft.ops.nf4 import Nf4, check_nf4, packed_bytes, rounded
from fft.planning.dry_run import planned
from fft.planning.layout import circumstances, layer_memory
from fft.weights.hf import WeightReader

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

#: Rows of whole blocks, and of 48 values, of which a block has one and a third.
WIDE = SMALL | {"hidden_size": 64, "intermediate_size": 128}
NARROW = SMALL | {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 72}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spec_of(config, lora, **options) -> ModelSpec:
    return ModelSpec(config, torch.float32, lora=lora, four_bits=True, **options)


def by_peft(folder, dora: bool):
    """transformers' model in four bits with an adapter of PEFT's, random everywhere, which is saved."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, quantization_config=nf4, device_map={"": "cpu"}
    )
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "o_proj", "down_proj"], use_dora=dora)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5) if "magnitude" in name else nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", WIDE), ("llama", NARROW), ("qwen2", WIDE | {"tie_word_embeddings": True})]
)
@pytest.mark.parametrize("selective", [False, True])
def test_loss_and_gradients_are_those_of_peft(family, sizes, dora, selective, tmp_path):
    config = AutoConfig.for_model(family, **sizes)
    write_random_model(config, tmp_path / "base", seed=1)
    theirs = by_peft(tmp_path, dora)
    lora = Lora(3, 12, ("q_proj", "o_proj", "down_proj"), dora=dora)
    reader = WeightReader(tmp_path / "base")
    made = StageBuilder(
        spec_of(config, lora, selective=selective), weights=reader, adapter=AdapterReader(tmp_path / "adapter")
    )
    modules, run = build(made)
    ours, expected = loss_by_layers(run), loss_by_transformers(theirs)
    torch.testing.assert_close(ours, expected)
    whole = StageBuilder(
        ModelSpec(config, torch.float32, lora=lora), weights=reader, adapter=AdapterReader(tmp_path / "adapter")
    )
    assert not torch.isclose(ours, loss_by_layers(build(whole)[1]), rtol=1e-4)  # rounding is seen
    ours.backward()
    expected.backward()
    names = {n.removeprefix(PREFIX).replace(".default", ""): p for n, p in theirs.named_parameters()}
    found = {name: p for name, p in canonical_parameters(modules).items() if p.requires_grad}
    assert len(found) == sum(p.requires_grad for p in names.values())
    for name, parameter in found.items():
        other = names[name if name in names else f"{name}.weight"].grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-5 * float(other.norm()), msg=name)


def test_lengths_begin_with_those_of_rounded_rows(tmp_path):
    config = AutoConfig.for_model("llama", **WIDE)
    write_random_model(config, tmp_path, seed=1)
    builder = StageBuilder(spec_of(config, Lora(3, 12, ("q_proj",), dora=True)), weights=WeightReader(tmp_path))
    projection = builder.build("model.layers.0").self_attn.q_proj
    stored = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(projection.lora_magnitude_vector, rounded(stored).norm(dim=1))
    assert not torch.allclose(projection.lora_magnitude_vector, stored.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "routers"),
    [("afmoe", {"mlp.router.gate"}), ("hunyuan_v1_moe", {"mlp.gate.wg"}), ("qwen2_moe", {"mlp.shared_expert_gate"})],
)
def test_routers_stay_as_they_are(kind, routers):
    spec = ModelSpec(small_config(kind), torch.float32, lora=Lora(2, 4, ("q_proj",)), four_bits=True)
    linear = {name for name, module in spec.skeleton.named_modules() if isinstance(module, nn.Linear)}
    within = {name for name in linear if ".layers." in name and not name.endswith(("lora_A", "lora_B"))}
    left = {re.sub(r"model\.layers\.\d+\.", "", name) for name in within if f"{name}.weight" not in spec.packed}
    assert left == routers


def test_what_is_packed_and_what_is_not():
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    config = AutoConfig.for_model("qwen2_moe", **WIDE, **moe)
    spec = spec_of(config, Lora(2, 4, ("q_proj",)))
    kinds = {re.sub(r"\.\d+\.", ".0.", name) for name in spec.packed}
    assert kinds == {
        f"model.layers.0.{name}.weight"
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
    layer = StageBuilder(spec).build("model.layers.1")
    parameters = dict(layer.named_parameters())
    assert not {name.removeprefix("model.layers.1.") for name in spec.packed} & set(parameters)
    assert {"mlp.experts.gate_up_proj", "mlp.gate.weight", "mlp.shared_expert_gate.weight"} <= set(parameters)
    assert {name.split(".")[-2] for name, p in parameters.items() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_leave_it_alone(dtype):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    held = Nf4(weight)
    cast = nn.Sequential(Nf4(weight)).to(dtype).half().bfloat16()[0]
    assert torch.equal(cast.whole(), held.whole())
    assert not [*cast.parameters()]
    assert not cast.state_dict()
    assert sum(buffer.nbytes for buffer in held.buffers()) == packed_bytes(weight.numel()) == 64 * 64 * 0.5625
    assert check_nf4(torch.device("cpu"), dtype) == f"NF4 bitsandbytes {bitsandbytes.__version__}"


def test_between_forward_and_backward_four_bits_are_kept():
    held, kept = Nf4(torch.randn(64, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        held(torch.randn(3, 64, requires_grad=True))
    assert {x.dtype for x in kept} == {torch.uint8, torch.int32}


def test_pieces_are_packed_as_the_whole(monkeypatch):
    weight = torch.randn(65, 66, generator=torch.Generator().manual_seed(0))
    whole = Nf4(weight)
    monkeypatch.setattr("fft.ops.nf4._PIECE", 128)
    pieces = Nf4(weight)
    assert all(map(torch.equal, whole.buffers(), pieces.buffers()))


def test_a_kernel_that_computes_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr("fft.ops.nf4.Nf4.whole", lambda held: torch.zeros(held.shape, dtype=held.dtype))
    with pytest.raises(UserError, match=r"bitsandbytes .* computes other values than NF4's on cpu"):
        check_nf4(torch.device("cpu"), torch.float32)


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"which cannot be imported .*: pip install bitsandbytes, or"):
        check_nf4(torch.device("cpu"), torch.float32)


def test_ranks_that_would_cut_blocks_are_refused():
    config = AutoConfig.for_model("llama", **WIDE)
    spec = spec_of(config, Lora(2, 4, ("q_proj",)))
    with pytest.raises(
        UserError, match=r"--model_parallel_size 2 leaves a rank 32 of the 64 inputs of .*o_proj.weight"
    ):
        check_blocks(spec.packed, spec.shards(0, 2), 2)
    wide = spec_of(AutoConfig.for_model("llama", **WIDE | {"hidden_size": 128}), Lora(2, 4, ("q_proj",)))
    check_blocks(wide.packed, wide.shards(0, 2), 2)
    check_blocks(spec.packed, spec.shards(0, 1), 1)


def test_memory_is_predicted(tmp_path):
    """Of what is packed 0.5625 bytes a weight, not two; and for a moment the largest of them, multiplied out."""
    config = AutoConfig.for_model("llama", **WIDE)
    config.save_pretrained(tmp_path)
    flags = ["--dry_run", "--model", str(tmp_path / "config.json"), "--lora_dim", "2", "--dtype", "bf16"]
    (plain, said), (held, told) = (planned(parse_arguments([*flags, *more]), 1) for more in ([], ["--load_in_4bit"]))
    packed = sum(cost.packed for cost in held.costs)
    layer = 2 * 64 * 64 + 2 * 64 * 64 * SMALL["num_key_value_heads"] // SMALL["num_attention_heads"] + 3 * 64 * 128
    assert packed == SMALL["num_hidden_layers"] * layer
    assert plain.memory[0].weights - held.memory[0].weights == packed * (2 - 0.5625)
    assert f"{packed / sum(cost.held for cost in held.costs):.0%} of all parameters in four bits (NF4)" in told
    assert "four bits" not in said
    moments = []
    for four_bits, layout in ((False, plain), (True, held)):
        spec = ModelSpec(config, torch.bfloat16, lora=Lora(2, 4, ("q_proj",)), four_bits=four_bits)
        args = parse_arguments(flags)
        at = circumstances(args, spec, layout.mesh, False, layout.costs)
        moments.append(layer_memory(args, spec, layout.mesh, at, layout.costs, None))
    for cost, before, now in zip(held.costs, *moments, strict=True):
        more = 2 * 64 * 128 if cost.packed else 0
        assert (now.saved, now.forward, now.backward) == (before.saved, before.forward + more, before.backward + more)


def test_a_layer_without_adapters_is_a_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    x = torch.randn(3, 5)
    assert torch.equal(FrozenLinear(linear)(x), linear(x))


def test_it_is_for_adapters_alone():
    with pytest.raises(UserError, match="--load_in_4bit is of a model below adapters, which alone are trained"):
        parse_arguments(["--model", "m", "--train_data", "t", "--output_dir", "o", "--load_in_4bit"])
