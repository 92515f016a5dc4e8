"""A small model of every family, forward and backward by the pipeline's layers: on the device as on the CPU."""

import statistics

import pytest
import torch
import transformers
from conftest import device_type
from transformers import CONFIG_MAPPING

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import InProcess, gradient_differences, loss_by_layers, relative, write_random_model
from fft.models.layers import canonical_parameters
from fft.models.small import small_config
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES
from fft.weights.hf import WeightReader

#: Largest relative differences of a loss and of gradients, of their norms, in fp32; in bf16 what the CPU's bf16 is away
#: from that itself, twice, and what nobody minds: a rounding may send a token to another expert.
ALLOWED = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 0.05)}
#: Of the rehearsal, where both sides are the CPU.
FEW = ("llama", "gpt_oss", "qwen3_next")


def pytest_generate_tests(metafunc):
    few = device_type(metafunc.config) == "cpu"
    metafunc.parametrize("kind", FEW if few else sorted(FAMILIES))


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory):
    """A config and a directory of random weights."""

    def of(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        config = small_config(kind)
        write_random_model(config, folder, seed=1)
        return config, folder

    return of


def taken(config, folder, dtype, device):
    """Loss, and gradients in fp32 on the CPU."""
    builder = StageBuilder(ModelSpec(config, dtype), weights=WeightReader(folder))
    run = InProcess(builder)
    run.modules.to(device)
    loss = loss_by_layers(run)
    loss.backward()
    named = canonical_parameters(run.modules)
    return loss.item(), {name: p.grad.float().cpu() for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", list(ALLOWED), ids=["fp32", "bf16"])
def test_the_device_computes_what_the_cpu_does(kind, dtype, device, directory_of, record_property):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"unknown to transformers {transformers.__version__}")
    config, folder = directory_of(kind)
    try:
        expected, theirs = taken(config, folder, torch.float32, torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    loss, ours = taken(config, folder, dtype, device)
    assert ours.keys() == theirs.keys()
    allowed = ALLOWED[dtype]
    if dtype == torch.bfloat16:
        rounded, others = taken(config, folder, dtype, torch.device("cpu"))
        away = relative(rounded, expected), statistics.median(gradient_differences(others, theirs).values())
        allowed = tuple(few + 2 * more for few, more in zip(allowed, away, strict=True))
    off = gradient_differences(ours, theirs)
    most = max(off, key=off.__getitem__)
    found = relative(loss, expected), off[most] if dtype == torch.float32 else statistics.median(off.values())
    for name, one, bound in zip(("loss", "gradients"), found, allowed, strict=True):
        record_property(f"difference of the {name}", one)
        record_property(f"difference of the {name}, at most", bound)
    assert found[0] <= allowed[0]
    assert found[1] <= allowed[1], most
