"""What the attention operator promises beyond its formula: precision, devices, refusals."""

import itertools
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.ops.attention import hf_attention, packed_attention
from fft.ops.backends import choice, cpu, cuda, flash_attention_2, flash_attention_3, flash_attention_4, meta, reference
from fft.ops.backends.choice import check_backend, choose, kernel_name
from fft.ops.documents import Documents, Segments


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def documents_of(*bounds) -> Documents:
    return Documents.of(bounds)


@pytest.mark.parametrize(
    ("padded", "bounds", "real"),
    [
        ([0, 2, 5, 5, 5, 5], (0, 2, 5), 5),
        ([0, 2, 3, 3, 3, 3], (0, 2, 3, 5), 3),
        ([0] * 6, (0, 5), 0),
        ([0, 1, 2, 3, 4, 5], (0, 1, 2, 3, 4, 5), 5),
    ],
)
def test_boundaries_that_travelled(padded, bounds, real):
    documents = Documents.from_padded(torch.tensor(padded, dtype=torch.int32))
    assert (documents.bounds, documents.real) == (bounds, (real, real))
    assert tuple(documents.cu_seqlens.tolist()) == bounds
    assert len(documents.positions()) == 5


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 8, 24]),
    seed=st.integers(0, 9),
)
def test_backends_agree_on_any_documents(lengths, kv_heads, groups, size, seed):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    segments, shape = Segments.within(documents_of(*bounds), 0.4), (bounds[-1], kv_heads, size)
    q, dout = (random((bounds[-1], kv_heads * groups, size), seed + i) for i in (0, 1))
    k, v = random(shape, seed + 2), random(shape, seed + 3)
    results = []
    for backend in (reference, cpu):
        out, lse = backend.forward(q, k, v, segments)
        results.append((out, lse, *backend.backward(dout, q, k, v, out, lse, segments)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=4),
    split=st.integers(1, 29),
    backend=st.sampled_from([reference, cpu]),
)
def test_parts_of_a_softmax_add_up(lengths, split, backend):
    """Rectangles over the first and the other keys of each document, given the whole's out and lse, make the whole."""

    def cumulative(values):
        return tuple(itertools.accumulate(values, initial=0))

    queries, keys = Documents.of(cumulative(a for a, _ in lengths)), Documents.of(cumulative(b for _, b in lengths))
    q, dout = random((queries.bounds[-1], 4, 8)), random((queries.bounds[-1], 4, 8), 1)
    k, v = random((keys.bounds[-1], 2, 8), 2), random((keys.bounds[-1], 2, 8), 3)
    segments = Segments(queries, keys, False, 0.4)
    out, lse = backend.forward(q, k, v, segments)
    whole = backend.backward(dout, q, k, v, out, lse, segments)
    total = [torch.zeros_like(x) for x in whole]
    for q_span, k_span in segments.spans():
        for part in (slice(k_span.start, k_span.start + split), slice(k_span.start + split, k_span.stop)):
            part = slice(part.start, min(part.stop, k_span.stop))
            if part.start >= part.stop:
                continue
            ends = Documents.of((0, q_span.stop - q_span.start)), Documents.of((0, part.stop - part.start))
            given = (dout[q_span], q[q_span], k[part], v[part], out[q_span], lse[:, q_span])
            grads = backend.backward(*given, Segments(*ends, False, 0.4))
            for sums, rows, grad in zip(total, (q_span, part, part), grads, strict=True):
                sums[rows] += grad
    for ours, theirs in zip(total, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_queries_without_keys_are_refused():
    with pytest.raises(ValueError, match="queries 3 to 5 have no keys"):
        Segments(documents_of(0, 3, 5), documents_of(0, 2, 2), False, 1.0).spans()


def test_reference_passes_gradcheck():
    """Gradients are written by hand; finite differences know nothing of that."""
    q, k, v = (random((7, heads, 3), seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    documents = documents_of(0, 4, 5, 7)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, documents, 0.5, reference), (q, k, v))


def test_bf16_is_as_good_as_bf16_can_be():
    """Scores and sums are float32: outputs are off by their own rounding (2^-9) and that of the weights, no more."""
    segments = Segments.within(documents_of(0, 50, 51, 200), 0.25)
    q, k, v, dout = (random((200, heads, 16), seed).bfloat16() for seed, heads in enumerate((4, 2, 2, 4)))
    for backend in (reference, cpu):
        out, lse = backend.forward(q, k, v, segments)
        grads = backend.backward(dout, q, k, v, out, lse, segments)
        assert lse.dtype == torch.float32
        exact, exact_lse = reference.forward(q.double(), k.double(), v.double(), segments)
        inputs = (x.double() for x in (dout, q, k, v))
        exact_grads = reference.backward(*inputs, exact, exact_lse, segments)
        for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.double() - theirs).norm() < 2**-7 * theirs.norm()


def test_each_device_gets_its_backend():
    device = torch.device("cpu")
    assert choose(device, torch.float32) is choose(device, torch.bfloat16) is cpu
    assert choose(device, torch.float64) is reference
    assert choose(torch.device("meta"), torch.bfloat16) is meta


def test_a_backend_may_be_asked_for_by_name():
    device = torch.device("cpu")
    assert choose(device, torch.float32, "cpu") is cpu
    assert choose(device, torch.float32, "reference") is reference
    asked = next(spec for spec in fields(TrainArguments) if spec.name == "attention").metadata["choices"]
    assert set(asked) == {"auto", "reference", *choice.KERNELS}


@pytest.mark.parametrize(
    ("name", "device", "sentence"),
    [
        ("cuda", "cpu", "--attention cuda runs on cuda in bfloat16 or float16, not on cpu in float32"),
        ("cpu", "cuda", "--attention cpu runs on cpu in float32 or bfloat16 or float16, not on cuda in float32"),
        ("npu", "cpu", "--attention npu runs on npu in bfloat16 or float16, not on cpu in float32"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(name, device, sentence):
    with pytest.raises(UserError, match=sentence):
        choose(torch.device(device), torch.float32, name)


def test_a_kernel_that_is_not_installed_is_refused():
    with pytest.raises(UserError, match="--attention flash_attention_2 needs the package flash-attn: install it"):
        choose(torch.device("cuda"), torch.bfloat16, "flash_attention_2")


@pytest.fixture
def gpu_with(monkeypatch):
    """Pretend that packages are installed on a GPU, and that some kernels fail their check."""

    def pretend(packages, wrong):
        def version(package):
            if package in packages:
                return "1"
            raise choice.PackageNotFoundError

        def checked(backend, *_):
            if backend in wrong:
                raise UserError(f"{kernel_name(backend)} differs")

        monkeypatch.setattr(choice, "version", version)
        monkeypatch.setattr(choice, "check_backend", checked)
        choose.cache_clear()

    yield pretend
    choose.cache_clear()


def test_capped_scores_get_a_kernel_that_caps(gpu_with):
    gpu_with(["flash-attn"], [])
    assert choose(torch.device("cuda"), torch.bfloat16, capped=True) is flash_attention_2
    assert choose(torch.device("cuda"), torch.bfloat16, "flash_attention_2", capped=True) is flash_attention_2
    gpu_with([], [])
    assert choose(torch.device("cuda"), torch.bfloat16, capped=True) is reference
    assert choose(torch.device("cpu"), torch.float32, capped=True) is reference


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_kernel_that_caps_no_scores_is_refused(name):
    with pytest.raises(UserError, match=f"--attention {name} caps no scores, .*: use one of flash_attention_4, fl"):
        choose(torch.device(name), torch.bfloat16, name, capped=True)
    q = random((4, 2, 8))
    with pytest.raises(ValueError, match="caps no scores"):
        cpu.forward(q, q, q, Segments.within(documents_of(0, 4), 1.0, 2.0))


FLASH = {"flash-attn-4": flash_attention_4, "flash-attn-3": flash_attention_3, "flash-attn": flash_attention_2}


@pytest.mark.parametrize(
    ("installed", "wrong", "chosen"),
    [
        ([], [], cuda),
        (["flash-attn"], [], flash_attention_2),
        (list(FLASH), [], flash_attention_4),
        (list(FLASH), [flash_attention_4, flash_attention_3], flash_attention_2),
        (list(FLASH), FLASH.values(), cuda),
    ],
)
@pytest.mark.filterwarnings("ignore:passed over")
def test_a_gpu_gets_the_newest_kernel_that_is_installed_and_right(gpu_with, installed, wrong, chosen):
    gpu_with(installed, wrong)
    assert choose(torch.device("cuda"), torch.bfloat16) is chosen


def test_kernels_passed_over_are_named(gpu_with):
    gpu_with(["flash-attn"], [flash_attention_2])
    with pytest.warns(UserWarning, match="passed over: flash_attention_2 differs"):
        choose(torch.device("cuda"), torch.bfloat16)


def test_nothing_trains_when_the_last_kernel_is_wrong(gpu_with):
    gpu_with([], [cuda])
    with pytest.raises(UserError, match="cuda differs"):
        choose(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize("size", [8, 128])
def test_backends_pass_the_check(backend, dtype, size):
    check_backend(backend, torch.device("cpu"), dtype, size)


def test_a_kernel_that_fails_is_refused():
    with pytest.raises(UserError, match="the cuda attention kernel of cpu in bfloat16, heads of 64, fails: NotImpl"):
        check_backend(cuda, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["output", "log-sum-exp", "dq", "dk", "dv"])
def test_a_wrong_kernel_is_refused(wrong, dtype):
    class Wrong:
        __name__ = "fft.ops.backends.wrong"

        @staticmethod
        def forward(*inputs):
            out, lse = cpu.forward(*inputs)
            return (out * 1.03 if wrong == "output" else out), (lse + 0.2 if wrong == "log-sum-exp" else lse)

        @staticmethod
        def backward(*inputs):
            grads = cpu.backward(*inputs)
            return tuple(g * 1.03 if wrong == n else g for n, g in zip(("dq", "dk", "dv"), grads, strict=True))

    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"the wrong attention kernel of cpu in {name}, .*: {wrong} by"):
        check_backend(Wrong(), torch.device("cpu"), dtype)


def test_models_compute_with_the_kernel_asked_for():
    calls = []

    class Counted:
        __name__ = "counted"
        backward = staticmethod(reference.backward)

        @staticmethod
        def forward(*inputs):
            calls.append(inputs)
            return reference.forward(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choice.KERNELS, "counted", choice.Kernel(Counted(), "cpu", (torch.float64,)))
        q = random((1, 2, 4, 8))
        expected, _ = hf_attention(None, q, q, q, None, 1.0, documents_of(0, 3, 4), attention="reference")
        assert not calls
        counted, _ = hf_attention(None, q, q, q, None, 1.0, documents_of(0, 3, 4), attention="counted")
    choose.cache_clear()
    assert len(calls) == 3 + 1  # the check's, ours
    assert torch.equal(counted, expected)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "no mask"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_what_a_model_would_silently_not_get_is_refused(asked, sentence):
    q = torch.zeros(1, 2, 4, 8)
    given = {"attention_mask": None, "scaling": 1.0, "documents": documents_of(0, 3, 4)}
    assert hf_attention(None, q, q, q, **given, sliding_window=3)[0].shape == (1, 4, 2, 8)
    with pytest.raises(ValueError, match=sentence):
        hf_attention(None, q, q, q, **{**given, **asked})
