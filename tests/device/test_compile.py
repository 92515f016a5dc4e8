"""Decoder layers compiled, with all, some and no activations kept: losses and gradients of layers that are not."""

import pytest
import torch
from engines import Taken, take_steps
from transformers import AutoConfig

from benchmarks.engines import Workload

WAYS = ("", "--checkpoint_grad_selective", "--checkpoint_grad_interval=1")
#: Largest relative differences of losses and of gradients, of a step: kernels that are fused round less often.
ALLOWED = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 4e-2)}


@pytest.fixture(scope="module")
def config(small):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 101}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}
    if not small:
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "vocab_size": 1009}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.04}
    return AutoConfig.for_model("qwen3", **sizes, **heads, max_position_embeddings=1 << 14)


@pytest.fixture(scope="module")
def taken(config, small):
    """Two steps of two micro-batches, whose documents are of so many tokens."""
    known = {}

    def of(dtype: str, document: int, *flags: str) -> Taken:
        if (dtype, document, flags) not in known:
            workload = Workload(config, 64 if small else 1024, 2, document=document, flags=(f"--dtype={dtype}", *flags))
            known[dtype, document, flags] = take_steps(workload, 2)
        return known[dtype, document, flags]

    return of


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ALLOWED)
def test_compiled_layers_compute_the_same(dtype, way, taken, small, record_property):
    if small and dtype == "bf16":
        pytest.skip("on a CPU a graph's operators run one by one: a type will do")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = tuple(filter(None, [way]))
    for document in (40, 13):
        ours, theirs = taken(dtype, document, "--compile", *flags), taken(dtype, document, "--fused_ops=none")
        losses = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
        off = [float((ours.gradients[name] - x).norm() / x.norm()) for name, x in theirs.gradients.items()]
        record_property(f"losses off, documents of {document}", max(losses))
        record_property(f"gradients off, documents of {document}", max(off))
        assert max(losses) <= ALLOWED[dtype][0]
        assert max(off) <= ALLOWED[dtype][1]
    # Of three layers and two numbers of documents: one graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
