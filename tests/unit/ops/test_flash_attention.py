"""The flash-attn backends without a GPU: their calls fit the published signatures, on stand-ins that follow them."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import bound, signatures
from test_ring import documents_of, emulate, tensors, whole

from fft.ops.backends import flash_attention_2, flash_attention_3, flash_attention_4, reference
from fft.ops.backends.choice import check_backend
from fft.ops.documents import Documents, Segments
from fft.parallel.ring_plan import plan_shards

#: Backend: the package's module, and its two functions.
PACKAGES = {
    flash_attention_2: (
        "flash_attn.flash_attn_interface",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
    ),
    flash_attention_3: ("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    flash_attention_4: ("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
}
#: What both functions may be given; anything else must be left at its default.
OURS = {
    *("q", "k", "v", "out", "dout", "lse", "softmax_lse", "dq", "dk", "dv", "softmax_scale", "causal"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "deterministic", "return_lse"),
    "softcap",
}
#: What asks for nothing, where there is no default.
NEUTRAL = (None, -1, 0.0)


class StandIn(types.ModuleType):
    """A package's two functions by their documented semantics."""

    def __init__(self, module: str, forward: str, backward: str):
        super().__init__(module)
        published = signatures("flash_attention.txt")
        self._published = {"forward": published[forward], "backward": published[backward]}
        self.calls = 0
        setattr(self, forward, self._forward)
        setattr(self, backward, self._backward)

    def _given(self, name, args, kwargs):
        self.calls += 1
        signature = self._published[name]
        given = bound(signature, args, kwargs)
        for argument, value in given.items():
            default = signature.parameters[argument].default
            assert argument in OURS or value is default or (default is signature.empty and value in NEUTRAL), argument
        assert not given.get("dropout_p")
        spans = []
        for side in "qk":
            cu_seqlens, longest = given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"]
            assert (cu_seqlens.dtype, cu_seqlens.is_contiguous()) == (torch.int32, True)
            spans.append(Documents.of(tuple(cu_seqlens.tolist())))
            assert longest == spans[-1].max_length
        if given["causal"]:
            assert spans[0].bounds == spans[1].bounds
        return given, Segments(*spans, given["causal"], given["softmax_scale"], given["softcap"] or None)

    def _forward(self, *args, **kwargs):
        given, segments = self._given("forward", args, kwargs)
        assert given.get("out") is None
        result = reference.forward(given["q"], given["k"], given["v"], segments)
        # FlashAttention 4 keeps the log-sum-exp of inputs that need no gradient to itself unless asked.
        return (result[0], result[1] if given.get("return_lse", True) else None, None, None)

    def _backward(self, *args, **kwargs):
        given, segments = self._given("backward", args, kwargs)
        lse = given["softmax_lse"] if "softmax_lse" in given else given["lse"]
        assert lse.is_contiguous()
        inputs = (given[name] for name in ("dout", "q", "k", "v", "out"))
        grads = reference.backward(*inputs, lse, segments)
        buffers = [given[name] for name in ("dq", "dk", "dv")]
        if buffers[0] is None:
            return grads
        for buffer, grad in zip(buffers, grads, strict=True):
            assert buffer.is_contiguous()
            buffer.copy_(grad)
        return grads[0].new_empty(0)  # the sums of products of dout and out


@pytest.fixture(scope="module", params=PACKAGES, ids=lambda backend: backend.__name__.rpartition(".")[2])
def installed(request):
    """(backend, the stand-in for its package)."""
    module, *functions = PACKAGES[request.param]
    package = StandIn(module, *functions)
    with pytest.MonkeyPatch.context() as patch:
        parts = module.split(".")
        for i in range(1, len(parts)):
            patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[0]))
        patch.setitem(sys.modules, module, package)
        yield request.param, package


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, 0.5]),
)
def test_calls_give_the_reference(installed, lengths, causal, cap):
    backend, package = installed
    queries = documents_of([a for a, _ in lengths])
    keys = queries if causal else documents_of([b for _, b in lengths])
    q, _, _, dout = tensors(queries.bounds[-1], 4, 2, 8)
    _, k, v, _ = tensors(keys.bounds[-1], 4, 2, 8, seed=1)
    segments, before = Segments(queries, keys, causal, 0.4, cap), package.calls
    results = []
    for tested in (backend, reference):
        out, lse = tested.forward(q, k, v, segments)
        results.append((out, lse, *tested.backward(dout, q, k, v, out, lse, segments)))
    assert package.calls == before + 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_ring_on_package_calls(installed):
    """The ring's slices, and a log-sum-exp and output of a larger softmax, reach the package as it wants them."""
    documents, inputs = documents_of([41, 3, 60]), tensors(104, 4, 2, 8)
    ours = emulate(plan_shards(documents.bounds, 4), inputs, installed[0], 0.3)
    for mine, theirs in zip(ours, whole(documents, inputs, reference, 0.3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_packages_pass_the_check(installed):
    for capped in (False, True):
        check_backend(installed[0], torch.device("cpu"), torch.bfloat16, capped=capped)
