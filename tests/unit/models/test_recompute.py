"""Selective recomputation: the same numbers, no expensive operator twice, and about half of the memory."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_causal_lm import build, builder, spec
from torch.utils._python_dispatch import TorchDispatchMode
from unit.ops.published import SCHEMAS

from fft.models.recompute import KEPT
from fft.models.small import NEEDS
from fft.ops.backends.choice import choose
from fft.planning.activations import layer_activations

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 2}


class Calls(TorchDispatchMode):
    """Counts operators by schema."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def gradients(selective: bool, **changes):
    """Outputs, gradients and operators of two micro-batches in flight at once, as in a pipeline's first stage."""
    made = builder("qwen2", options={"selective": selective}, **changes)
    if made.balance is not None:
        made.balance.start(2)
    modules, run = build(made)
    rows = [torch.arange(12)[None], torch.arange(8, 20)[None]]
    with Calls() as calls:
        outputs = [run(ids, bounds)[0] for ids, bounds in zip(rows, ([0, 5, 12], [0, 12]), strict=True)]
        for output in outputs:
            output.square().sum().backward()
    return outputs, [p.grad for p in modules.parameters() if p.grad is not None], calls.count


@pytest.mark.parametrize("family", ["dense", "experts"])
def test_the_same_gradients_without_a_second_product(family):
    changes = {"model_type": "qwen3_moe", "head_dim": 16, **MOE} if family == "experts" else {}
    choose.cache_clear()  # the first time, the attention kernel is compared with its reference
    gradients(True, **changes)
    expected, found = gradients(False, **changes), gradients(True, **changes)
    for a, b in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(a, b)
    assert {name: found[2][name] for name in KEPT} == {name: expected[2][name] for name in KEPT}
    assert found[2]["aten::silu"] == 2 * expected[2]["aten::silu"]


def test_biases_of_experts_are_added_in_place_to_products_that_run_again():
    changes = NEEDS["gpt_oss"] | {"model_type": "gpt_oss", "sliding_window": 4, "head_dim": 16}
    expected, found = gradients(False, **changes), gradients(True, **changes)
    for a, b in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(a, b)


def test_nothing_is_kept_where_nothing_is_trained():
    made = builder("qwen2", options={"selective": True})
    _, run = build(made)
    with torch.no_grad(), Calls() as calls:
        run(torch.arange(12)[None], [0, 12])
    assert calls.count["aten::silu"] == made.spec.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_halves_what_layers_keep(dtype):
    made = spec("qwen2", dtype, hidden_size=64, intermediate_size=256)
    kept = layer_activations(made, 512)[1].saved
    assert 0.4 * kept < layer_activations(replace(made, selective=True), 512)[1].saved < 0.6 * kept


def test_the_kernels_named_exist():
    """By PyTorch's registry, and by what packages publish that are not here."""
    published = "".join((SCHEMAS / file).read_text() for file in ("flash_attention.txt", "torch_npu.txt"))
    for namespace, name in (kept.split("::") for kept in KEPT):
        if namespace in ("aten", "_c10d_functional", "fft"):
            assert hasattr(getattr(torch.ops, namespace), name)
        else:
            assert re.search(rf"\b{namespace}::{name}\b|^{name}\(", published, re.MULTILINE)
