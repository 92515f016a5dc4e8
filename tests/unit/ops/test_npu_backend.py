"""The NPU backend without an NPU: its calls against the published schemas, and on a stand-in that follows them.

``FFT_TORCH_NPU_WHEEL=path/to/torch_npu.whl`` reads the schemas from a wheel (which need not be installable here)
instead of the lines kept in ``schemas/torch_npu.txt``.
"""

import os
import sys
import types
import zipfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import SCHEMAS
from test_ring import documents_of, emulate, tensors, whole

from fft.ops.backends import npu, reference
from fft.ops.documents import Documents, Segments
from fft.parallel.ring_plan import plan_shards

KEPT = SCHEMAS / "torch_npu.txt"
IN_WHEEL = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def schemas(*names: str) -> dict[str, torch.FunctionSchema]:
    """The schemas of operators, by name."""
    wheel = os.environ.get("FFT_TORCH_NPU_WHEEL")
    text = zipfile.ZipFile(wheel).read(IN_WHEEL).decode() if wheel else KEPT.read_text()
    lines = [line.strip().removeprefix("- ").removeprefix("func: ") for line in text.splitlines()]
    return {name: torch._C.parse_schema(line) for name in names for line in lines if line.startswith(f"{name}(")}


def bound(schema: torch.FunctionSchema, args: tuple, kwargs: dict) -> dict:
    """Every argument of a call by name, defaults included; fails where the call does not fit."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip(positional[: len(args)], args, strict=True))
    unknown = set(kwargs) - {argument.name for argument in schema.arguments}
    assert not unknown, f"{schema.name} has no {unknown}"
    assert not set(kwargs) & set(positional[: len(args)])
    given |= kwargs
    assert set(given) == {argument.name for argument in schema.arguments}
    return given


class StandIn(types.ModuleType):
    """The documented semantics of the two operators, for the arguments given; every call must fit its schema."""

    def __init__(self):
        super().__init__("torch_npu")
        self.schemas = schemas("npu_fusion_attention", "npu_fusion_attention_grad")
        self.calls = 0

    def npu_fusion_attention(self, *args, **kwargs):
        given = self._bind("npu_fusion_attention", args, kwargs)
        q, k, v = given["query"], given["key"], given["value"]
        segments = self._segments(given, given["scale"])
        out, lse = reference.forward(q, k, v, segments)
        maximum = lse.t() - 1.5  # any split of the log-sum-exp into maximum and log of a sum will do
        total = torch.full_like(maximum, 1.5).exp()
        maximum, total = (
            self._arranged(x, given, segments.queries)[..., None].repeat(1, 1, 8) for x in (maximum, total)
        )
        return out, maximum, total, q.new_empty(0), 0, 0, 0

    def npu_fusion_attention_grad(self, *args, **kwargs):
        given = self._bind("npu_fusion_attention_grad", args, kwargs)
        q, k, v, out = (given[name] for name in ("query", "key", "value", "attention_in"))
        maximum, total = given["softmax_max"], given["softmax_sum"]
        assert maximum.shape == total.shape == (*q.shape[:2], 8)
        assert given["softmax_layout"] == "TND"
        lse = (maximum[..., 0] + total[..., 0].log()).t()
        grads = reference.backward(given["dy"], q, k, v, out, lse, self._segments(given, given["scale_value"]))
        return *grads, None, None

    def _bind(self, name, args, kwargs):
        self.calls += 1
        given = bound(self.schemas[name], args, kwargs)
        assert (given["input_layout"], given["head_num"]) == ("TND", given["query"].shape[1])
        return given

    @staticmethod
    def _segments(given, scale):
        queries, keys = (Documents.of((0, *given[name])) for name in ("actual_seq_qlen", "actual_seq_kvlen"))
        causal = given["sparse_mode"] == 3
        if causal:  # the mask is compressed, True where nothing is seen; aligned at the end of queries and keys
            assert torch.equal(given["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))
            assert queries.bounds == keys.bounds
        else:
            assert given["sparse_mode"] == 0
            assert given["atten_mask"] is None
        return Segments(queries, keys, causal, scale)

    @staticmethod
    def _arranged(x, given, queries):
        if given["softmax_layout"] == "TND":
            return x
        return torch.cat([x[a:b].t().reshape(b - a, -1) for a, b in pairwise(queries.bounds)])


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    module = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_npu", module)
        yield module


def test_schemas_are_found():
    names = {"npu_fusion_attention", "npu_fusion_attention_grad"}
    assert set(schemas(*names)) == names


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=4), st.booleans())
def test_calls_give_the_reference(stand_in, lengths, causal):
    queries = documents_of([a for a, _ in lengths])
    keys = queries if causal else documents_of([b for _, b in lengths])
    q, _, _, dout = tensors(queries.bounds[-1], 4, 2, 8)
    _, k, v, _ = tensors(keys.bounds[-1], 4, 2, 8, seed=1)
    segments, before = Segments(queries, keys, causal, 0.4), stand_in.calls
    results = []
    for backend in (npu, reference):
        out, lse = backend.forward(q, k, v, segments)
        grads = backend.backward(dout, q, k, v, out, lse, segments)
        results.append((out, lse, *grads))
    assert stand_in.calls == before + 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_ring_on_npu_calls():
    documents, inputs = documents_of([41, 3, 60]), tensors(104, 4, 2, 8)
    ours = emulate(plan_shards(documents.bounds, 4), inputs, npu, 0.3)
    for mine, theirs in zip(ours, whole(documents, inputs, reference, 0.3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
