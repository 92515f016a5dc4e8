"""The fused loss against float64: value, gradients, and the memory that the table says it holds."""

import pytest
import torch

from fft.ops import cross_entropy
from fft.ops.compare import TOLERANCE
from fft.ops.cross_entropy import IGNORE, HeadSum, linear_cross_entropy, logit_bytes, piece_rows
from fft.ops.logits import FusedLogits, choose_logits
from fft.planning.activations import Alive
from fft.planning.memory import loss_memory

#: Largest errors, relative, of the value and of a gradient. Half types round logits and softmax, and where a product is
#: split, its parts; errors of a thousand tokens' losses average out. float32 adds up a vocabulary of products, one by
#: one at worst (sqrt(128k) roundings); as TF32 it would be off by 5e-4.
ALLOWED = {
    torch.bfloat16: (1e-4, TOLERANCE[torch.bfloat16]),
    torch.float16: (2e-5, TOLERANCE[torch.float16]),
    torch.float32: (1e-6, 5e-5),
}
TYPES = pytest.mark.parametrize("dtype", list(ALLOWED), ids=["bf16", "fp16", "fp32"])


@pytest.fixture
def sizes(small, monkeypatch) -> tuple[int, int, int]:
    """Tokens, hidden size, vocabulary. Several pieces of logits, the last cut off: Llama 3's head, or a small one."""
    if not small:
        return 5000, 4096, 128_256
    monkeypatch.setattr(cross_entropy, "PIECE", 60 * 1000 * 4)
    return 172, 64, 1000


def normal(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@pytest.fixture
def inputs(sizes, device):
    """Hidden states and weight whose logits are some units wide, and labels of which every ninth is not trained."""
    tokens, hidden, vocabulary = sizes
    states = normal(tokens, hidden, seed=1, device=device)
    weight = normal(vocabulary, hidden, seed=2, device=device) * 3 * hidden**-0.5
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::9] = IGNORE
    labels[-3:] = vocabulary - 1
    return states, weight, labels.to(device)


def in_float64(states, weight, labels):
    """The sum of the losses and both gradients, where the device can multiply float64, else on the CPU."""
    place = states.device if states.device.type == "cuda" else torch.device("cpu")
    leaves = [x.detach().to(place, torch.float64).requires_grad_() for x in (states, weight)]
    logits = leaves[0] @ leaves[1].t()
    loss = torch.nn.functional.cross_entropy(logits, labels.to(place), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """On the device that has the exact one: the weight's gradient is too large to be moved for nothing."""
    return float((ours.detach().to(exact.device, torch.float64) - exact).norm() / exact.norm())


@TYPES
def test_value_and_gradients(dtype, inputs, record_property):
    *values, labels = inputs
    leaves = [x.to(dtype).requires_grad_() for x in values]
    loss = linear_cross_entropy(*leaves, labels)
    (loss * 0.7).backward()
    exact, *grads = in_float64(*leaves, labels)
    allowed_loss, allowed = ALLOWED[dtype]
    error = relative_error(loss, exact)
    record_property("error of the loss", error)
    assert error <= allowed_loss
    for name, leaf, grad in zip(("states", "weight"), leaves, grads, strict=True):
        assert leaf.grad.dtype == dtype
        error = relative_error(leaf.grad, grad.mul_(0.7))
        record_property(f"error of the gradient of {name}", error)
        assert error <= allowed, f"{name}: {error:.1e}"
    untrained = (labels == IGNORE).nonzero().squeeze(-1)
    assert not leaves[0].grad[untrained].any()


@pytest.mark.parametrize("trained", ["nothing", "one token", "a piece", "a piece and one token"])
def test_ragged_ends(trained, inputs, sizes, device):
    states, weight, labels = inputs
    rows = piece_rows(sizes[2], logit_bytes(4))
    count = {"nothing": 0, "one token": 1, "a piece": rows, "a piece and one token": rows + 1}[trained]
    labels = torch.where(torch.arange(len(labels), device=device) < count, labels.clamp(min=0), IGNORE)
    leaves = [x.clone().requires_grad_() for x in (states, weight)]
    loss = linear_cross_entropy(*leaves, labels)
    loss.backward()
    exact, *grads = in_float64(*leaves, labels)
    if not count:
        assert not any(bool(x.any()) for x in (loss, *(leaf.grad for leaf in leaves)))
        return
    assert relative_error(loss, exact) <= 5e-6  # a single token's error does not average out
    for leaf, grad in zip(leaves, grads, strict=True):
        assert relative_error(leaf.grad, grad) <= ALLOWED[torch.float32][1]


@TYPES
def test_its_memory_is_what_the_table_says(dtype, inputs, sizes, device, record_property):
    """Of the forward, whose piece of logits is the fullest moment of many a step, and what it keeps."""
    *values, labels = inputs
    leaves = [x.to(dtype).requires_grad_() for x in values]
    told = loss_memory(*sizes, dtype.itemsize)
    if device.type == "cpu":
        with Alive([*leaves, labels]) as alive:
            loss = linear_cross_entropy(*leaves, labels)
            most, kept = alive.most, alive.now
    else:
        memory = torch.get_device_module(device)
        linear_cross_entropy(*leaves, labels)  # what the libraries of the device allocate once
        before = memory.memory_allocated()
        memory.reset_peak_memory_stats()
        loss = linear_cross_entropy(*leaves, labels)
        most, kept = memory.max_memory_allocated() - before, memory.memory_allocated() - before
    record_property("bytes at most", most)
    record_property("bytes at most, of the table's", most / (told.saved + told.forward))
    assert loss.isfinite()
    assert kept == pytest.approx(told.saved, rel=0.1)
    assert most == pytest.approx(told.saved + told.forward, rel=0.1)


@TYPES
def test_the_head_s_gradient_is_added_to_its_sum(dtype, inputs, record_property):
    """By the product that makes it, with the factor that backward is going to have: what is there already stays."""
    *values, labels = inputs
    leaves = [x.to(dtype).requires_grad_() for x in values]
    total = torch.ones_like(leaves[1], dtype=torch.float32)
    (linear_cross_entropy(*leaves, labels, head=HeadSum(total, empty=False, factor=0.7)) * 0.7).backward()
    assert leaves[1].grad is None
    _, *grads = in_float64(*leaves, labels)
    for name, ours, grad in zip(("states", "weight"), (leaves[0].grad, total - 1), grads, strict=True):
        error = relative_error(ours, grad.mul_(0.7))
        record_property(f"error of the gradient of {name}", error)
        assert error <= ALLOWED[dtype][1], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_gpu_has_the_kernel(dtype, device):
    if device.type != "cuda":
        pytest.skip("the kernel is compiled for GPUs")
    assert choose_logits(device, dtype) is FusedLogits
