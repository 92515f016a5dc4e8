"""The loss against naive logits, against its peer, and against the floor: its three products at the measured rate."""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.device.frame import Cases, Row, Setting, free, milliseconds, peak_bytes
from benchmarks.device.hardware import matrix_rate, product_milliseconds
from fft.ops.cross_entropy import HeadSum, linear_cross_entropy

#: Tokens, hidden size, vocabulary: of Llama-3-8B, and with a vocabulary as small as Llama 2's.
SIZES = ((8192, 4096, 128256), (8192, 4096, 32000), (32768, 4096, 128256))
SMALLEST = ((64, 32, 256),)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The product's."""
    return linear_cross_entropy(hidden, weight, labels)


def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As a run has it: the weight's gradient is added to a sum that is there."""
    total = _sum_for(weight.shape, weight.device)
    return linear_cross_entropy(hidden, weight, labels, head=HeadSum(total, empty=False, factor=1.0))


@functools.lru_cache(maxsize=1)
def _sum_for(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device)


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, in fp32, as transformers has them."""
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy (arXiv:2410.10989), its sums in fp32 as ours are."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum", accum_dtype=torch.float32)


WAYS = {"fused": fused, "fused, summed": summed, "naive": naive, "Liger": liger}


def cases(setting: Setting) -> Cases:
    """Each way at each size, and the head's product in pieces of rows."""
    for tokens, hidden, vocabulary in SMALLEST if setting.smallest else SIZES:
        size = f"{tokens} x {hidden} x {vocabulary}"
        for name, way in WAYS.items():
            yield f"{name}, {size}", functools.partial(measure, setting, name, way, (tokens, hidden, vocabulary))
        if tokens == 8192 or setting.smallest:
            yield f"products, {size}", functools.partial(products, setting, tokens, hidden, vocabulary)


def measure(
    setting: Setting, name: str, way: Callable[[Tensor, Tensor, Tensor], Tensor], size: tuple[int, int, int]
) -> list[Row]:
    """Forward and backward of one way."""
    tokens, width, vocabulary = size
    told: Row = {"loss": name, "tokens": str(tokens), "hidden": str(width), "vocabulary": str(vocabulary)}
    if name == "Liger" and (setting.device.type == "cpu" or not find_spec("liger_kernel")):
        return [told | {"note": "not on cpu" if setting.device.type == "cpu" else "liger_kernel is not installed"}]
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device).bfloat16()

    hidden, weight = random(tokens, width).requires_grad_(), random(vocabulary, width).mul_(0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=setting.device)
    held = sum(x.nbytes for x in (hidden, weight, labels))

    def once() -> None:
        torch.autograd.grad(way(hidden, weight, labels), (hidden, weight), allow_unused=True)

    once()
    free(setting.device)  # the maximum is counted without what was needed to make the inputs
    spent = milliseconds(once, setting.device, 2 if setting.smallest else 10)
    most = peak_bytes(setting.device)
    floor = 3 * 2.0 * tokens * width * vocabulary / matrix_rate(setting) * 1e3
    told |= {"ms": spent, "floor ms": floor, "of floor %": 100 * floor / spent}
    return [told | {"peak GB": max(0, most - held) / 1e9}]


def products(setting: Setting, tokens: int, width: int, vocabulary: int) -> list[Row]:
    """Rates of the head's product in pieces of so many rows: 2^26 logits, 2^28 logits, all."""
    rows = []
    for piece in ((1 << 26) // vocabulary, (1 << 28) // vocabulary // 256 * 256, tokens):
        count = max(1, min(piece, tokens))
        spent = product_milliseconds(setting, count, width, vocabulary)
        rate = 2.0 * count * width * vocabulary / spent * 1e3
        told: Row = {"loss": "one product", "tokens": str(count), "hidden": str(width), "vocabulary": str(vocabulary)}
        rows.append(told | {"ms": spent, "of floor %": 100 * rate / matrix_rate(setting)})
    return rows
