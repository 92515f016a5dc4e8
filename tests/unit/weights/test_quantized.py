"""FP8 with block scales is what its scales make of it; every other quantization is refused, wherever it is met."""

import json

import pytest
import torch
from conftest import SMALL
from pipelines import build
from transformers import AutoConfig

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.directory import load_config
from fft.models.in_process import loaded, loss_by_layers, loss_by_transformers, write_random_model
from fft.models.spec import ModelSpec
from fft.parallel.tensor_plan import Shard
from fft.weights import hf
from fft.weights.quantized import BlockScales

ROWS, COLUMNS = 16, 8
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [ROWS, COLUMNS]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As DeepSeek publishes it: a scale for every block, the last of which may be cut."""
    rows, columns = -(-weight.shape[0] // ROWS), -(-weight.shape[1] // COLUMNS)
    scales, codes = torch.empty(rows, columns), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * ROWS, (i + 1) * ROWS), slice(j * COLUMNS, (j + 1) * COLUMNS)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def set_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def published(folder, model_type="llama", **changes):
    """A directory whose decoder layers' matrices are FP8."""
    write_random_model(AutoConfig.for_model(model_type, **(SMALL | changes)), folder, 0)
    reader, tensors = hf.WeightReader(folder), {}
    for name in reader.names:
        value = reader.tensor(name)
        tensors[name] = value
        if "_proj" in name and value.ndim == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(value)
    hf.write_shard(folder, tensors, 0, 1)
    set_config(folder, quantization_config=FP8)
    return folder


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("qwen3_moe", EXPERTS)])
def test_fp8_computes_what_transformers_computes(model_type, changes, tmp_path):
    published(tmp_path, model_type, **changes)
    config = load_config(str(tmp_path), init=False)
    assert not hasattr(config, "quantization_config")
    _, run = build(StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(tmp_path)))
    torch.testing.assert_close(loss_by_layers(run), loss_by_transformers(loaded(tmp_path)), rtol=2e-6, atol=0)


def test_a_cut_block_and_a_part_of_a_tensor():
    weight = torch.randn(40, 35)
    codes, scales = quantize(weight)
    whole = BlockScales(ROWS, COLUMNS).multiplied(codes, scales, (40, 35), None)
    torch.testing.assert_close(whole, weight, rtol=0.07, atol=0.01)
    for dim, spans in ((0, ((5, 21), (33, 40))), (1, ((15, 17),))):
        shard = Shard((40, 35), dim, spans)
        at = torch.cat([torch.arange(a, b) for a, b in spans])
        part = BlockScales(ROWS, COLUMNS).multiplied(codes.index_select(dim, at), scales, (40, 35), shard)
        assert torch.equal(part, whole.index_select(dim, at))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method 'bitsandbytes'"),
        (FP8 | {"weight_block_size": None}, "weight_block_size None"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme 'static'"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8 | {"hadamard": True}, "hadamard True"),
        ("awq", "quant_method 'awq'"),
    ],
)
def test_other_quantizations_are_refused_by_name(settings, said, tmp_path):
    write_random_model(AutoConfig.for_model("llama", **SMALL), tmp_path, 0)
    set_config(tmp_path, quantization_config=settings)
    for read in (lambda: load_config(str(tmp_path), init=True), lambda: hf.WeightReader(tmp_path)):
        with pytest.raises(UserError, match=f"is quantized .*{said}"):
            read()


def test_codes_without_a_word_in_the_config_are_refused(tmp_path):
    published(tmp_path)
    set_config(tmp_path, quantization_config=None)
    with pytest.raises(UserError, match=r"holds codes \(torch\.float8_e4m3fn\) of a quantization that is not read"):
        hf.WeightReader(tmp_path).tensor("model.layers.0.mlp.up_proj.weight")
    hf.write_shard(tmp_path, {"a": torch.ones(3, 3, dtype=torch.int8)}, 0, 1)
    with pytest.raises(UserError, match=r"holds codes \(torch\.int8\)"):
        hf.WeightReader(tmp_path).tensor("a")


def test_scales_of_another_grid_are_named(tmp_path):
    published(tmp_path)
    set_config(tmp_path, quantization_config=FP8 | {"weight_block_size": [8, 4]})
    with pytest.raises(UserError, match=r"q_proj\.weight has scales \(2, 4\) of torch.float32 where blocks of 8 x 4"):
        hf.WeightReader(tmp_path).read("model.layers.0.self_attn.q_proj.weight", (32, 32))
