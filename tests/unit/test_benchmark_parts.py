"""What the device's benchmarks make of what they see: kinds of kernels, layers that fit, FLOPs of a step, memory."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.device import layer, profile
from benchmarks.device.frame import Setting
from benchmarks.device.shapes import Case, layers_that_fit, model_config, step_flops, workload
from benchmarks.device.step import cases, measure
from fft.models.spec import ModelSpec
from fft.training.work import DATASHEET, flops_per_token

FLASH = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64>>"
BACKWARD = "autograd::engine::evaluate_function: "


@pytest.mark.parametrize(
    ("kind", "name", "within"),
    [
        (profile.ATTENTION, FLASH, ("aten::_flash_attention_forward", "_PackedAttention")),
        (profile.ATTENTION, "cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", ()),
        (profile.ATTENTION, "FlashAttentionScoreGrad", ()),
        # A copy that attention makes is its own, whatever it is called.
        (profile.ATTENTION, "Memcpy DtoD (Device -> Device)", ("aten::copy_", "_PackedAttentionBackward", BACKWARD)),
        (profile.PRODUCTS, "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", ("aten::mm", "aten::matmul", "aten::linear")),
        (profile.PRODUCTS, "sm80_xmma_gemm_bf16bf16_bf16f32", ()),
        (profile.PRODUCTS, "a kernel of no known name", ("aten::addmm",)),
        (profile.PRODUCTS, "aten::mm", ("MmBackward0", f"{BACKWARD}MmBackward0")),
        (profile.ELEMENTWISE, "_rms_norm_forward_kernel", ("LigerRMSNormFunction",)),
        (profile.ELEMENTWISE, "void at::native::vectorized_elementwise_kernel<4, MulFunctor>", ("aten::mul",)),
        (profile.LOSS, "nvjet_tst_192x192", ("aten::mm", "aten::matmul", "_LinearCrossEntropy", "loss")),
        (profile.LOSS, "elementwise", ("aten::mul", "_LinearCrossEntropyBackward", f"{BACKWARD}_LinearCross")),
        (profile.OPTIMIZER, "multi_tensor_apply_kernel", ("aten::_fused_adamw_", "Optimizer.step", "optimizer")),
        (profile.OPTIMIZER, "ncclDevKernel_AllReduce", ("c10d::allreduce_", "optimizer")),
        (profile.SUMS, "elementwise", ("aten::add_", "torch::autograd::AccumulateGrad", BACKWARD)),
        (profile.COPIES, "Memcpy HtoD (Pageable -> Device)", ("aten::copy_", "aten::to")),
        (profile.COPIES, "ncclDevKernel_SendRecv", ("c10d::send",)),
    ],
)
def test_a_kernel_is_counted_where_it_belongs(kind, name, within):
    assert profile.kind_of(name, within) == kind


def test_shares_of_a_step_add_up_to_its_time():
    work = [
        profile.Work("gemm", ("aten::mm",), 40.0),
        profile.Work("gemm", ("aten::mm",), 20.0),
        profile.Work("another gemm", (), 10.0),
        profile.Work("flash", (), 15.0),
    ]
    rows = {row["where"]: row for row in profile.account(work, 100.0)}
    assert set(rows) == {profile.PRODUCTS, profile.ATTENTION, profile.GAPS}
    assert rows[profile.PRODUCTS]["ms"] == pytest.approx(0.070)
    assert (rows[profile.PRODUCTS]["largest"], rows[profile.PRODUCTS]["launches"]) == ("gemm", "3")
    assert rows[profile.GAPS]["ms"] == pytest.approx(0.015)
    assert sum(row["share %"] for row in rows.values()) == pytest.approx(100)


def test_time_of_two_streams_is_counted_once():
    spans = [(0.0, 10.0), (2.0, 5.0), (8.0, 14.0), (20.0, 21.0)]
    assert list(profile.alone(spans)) == [10.0, 0.0, 4.0, 1.0]


def test_kernels_are_counted_within_what_launched_them():
    """Not the ranges drawn on the device's line; nor by the numbers of the driver's calls, which are others."""
    loss = host(1, "loss")
    product = host(2, "aten::mm", loss)
    driver = host(3, "cudaLaunchKernel", product, linked=2)
    plain = host(3, "aten::mul")
    kernels = [kernel("reduce", 50, 70, 3), kernel("nvjet", 10, 40, 2), kernel("loss", 10, 40, 1, annotation=True)]
    seen = SimpleNamespace(
        events=lambda: [loss, product, plain, driver],
        profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: kernels)),
    )
    found = profile.work_of(seen)
    assert found == [
        profile.Work("nvjet", ("aten::mm", "loss"), 30.0),
        profile.Work("reduce", ("aten::mul",), 20.0),
    ]
    assert [profile.kind_of(work.name, work.within) for work in found] == [profile.LOSS, profile.ELEMENTWISE]


def host(number, name, parent=None, linked=0):
    """An operator, a range or a call of the driver, as torch.autograd.profiler has it."""
    return SimpleNamespace(
        id=number, name=name, cpu_parent=parent, linked_correlation_id=linked, device_type=DeviceType.CPU
    )


def kernel(name, begin, end, linked, annotation=False):
    """A kernel as Kineto has it; microseconds."""
    told = {"name": name, "start_ns": 1000 * begin, "duration_ns": 1000 * (end - begin)}
    told |= {"linked_correlation_id": linked, "is_user_annotation": annotation, "device_type": DeviceType.CUDA}
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in told.items()})


def test_as_many_layers_as_the_plan_allows():
    work = workload("8B", 128, smallest=True)

    def planned(given):
        return 100 + 10 * given.config.num_hidden_layers

    assert [layers_that_fit(work, memory / 0.92, planned) for memory in (109, 110, 129, 140, 1000)] == [0, 1, 2, 4, 4]


def test_shapes_are_those_of_the_published_models():
    sizes = {}
    for shape in ("1B", "3B", "8B"):
        spec = ModelSpec(model_config(shape), torch.bfloat16)
        sizes[shape] = sum(parameter.numel() for parameter in spec.skeleton.parameters())
    assert sizes == {"1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248}


def test_a_step_counts_attention_by_its_documents():
    """Of a token 6 FLOPs a parameter; 12 a head and its size for each token seen, half of its document on average."""
    config = model_config("8B", smallest=True)
    whole = workload("8B", 128, micro_batches=2, smallest=True)
    spec = ModelSpec(config, torch.bfloat16)
    matrices = sum(p.numel() for name, p in spec.skeleton.named_parameters() if "embed" not in name)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert step_flops(whole) == 2 * 128 * 6 * (matrices + attention * 128)
    quarters = dataclasses.replace(whole, document=32)
    assert quarters.bounds == [0, 32, 64, 96, 128]
    assert step_flops(quarters) == 2 * 128 * 6 * (matrices + attention * 32)
    assert flops_per_token([1.0]) == 6


def test_a_layer_with_attention_as_an_operator_computes_the_same():
    """Forward and backward, traced whole as a compiler does; a CPU has no graphs to capture, and says so."""
    rehearsal = Setting(torch.device("cpu"), True)
    (row,) = layer.measure(rehearsal, "8B", 64, "compiled")
    assert float(row["differs by"]) < 1e-6
    assert layer.measure(rehearsal, "8B", 64, "graph")[0]["note"] == "not on cpu"


def test_a_layer_with_room_for_more_documents_computes_the_same():
    """Those that are not there are empty: what a graph for any row relies on."""
    rehearsal = Setting(torch.device("cpu"), True)
    hidden, grad = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden.requires_grad_()
    one, roomy = (
        layer.passes(layer.Layer(rehearsal, "8B", bounds, False, False), hidden, grad)()
        for bounds in ((0, 64), (0, 64, 64, 64))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, roomy, strict=True))


@pytest.mark.slow
def test_an_engine_gives_its_memory_back(launch):
    done = launch(sys.executable, "-c", GIVES_BACK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "21 parameters, 0 left"


GIVES_BACK = """
import weakref
from benchmarks.device.shapes import with_layers, workload
from benchmarks.engines import with_engine

held = []

def use(step, engine):
    held.extend(map(weakref.ref, engine.parameters.values()))
    assert step() > 0

with_engine(with_layers(workload("8B", 64, micro_batches=2, smallest=True), 2), use)
print(f"{len(held)} parameters, {sum(parameter() is not None for parameter in held)} left")
"""


def test_the_whole_model_is_extrapolated_and_says_so(monkeypatch):
    """Two of four layers fit, the first costs nothing but what all share: four take twice a layer's time longer."""
    monkeypatch.setattr("benchmarks.device.shapes.layers_that_fit", lambda *_: 2)
    monkeypatch.setattr("benchmarks.device.step._time", lambda _, work: (10.0 + work.config.num_hidden_layers, 7))
    (row,) = measure(Setting(torch.device("cpu"), True), Case("8B", 128))
    assert (row["layers"], row["whole model"]) == ("2 of 4", "extrapolated per layer")
    assert (row["ran ms"], row["layer ms"], row["step ms"]) == (12.0, 0.5, 14.0)


def test_names_of_cases_and_devices_are_told_apart():
    names = [name for name, _ in cases(Setting(torch.device("cuda"), False))]
    assert len(set(names)) == len(names)
    named = {name: next(rate for part, rate in DATASHEET.items() if part in name) for name in DEVICES}
    assert named == DEVICES


DEVICES = {
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.4,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA H20": 148.0,
    "Ascend910B3": 313.0,
}
