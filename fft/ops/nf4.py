"""Frozen weights in four bits (NF4 of QLoRA, arXiv:2305.14314), by bitsandbytes.

Of every 64 values, in the order of memory, the largest magnitude is kept in fp32, and of each value the nearest of 16
numbers times that. Products multiply a weight out, in the type of what it is multiplied by, once in forward and once in
backward: between the two, autograd keeps four bits, where it would keep the whole weight of an ordinary product.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fft.errors import UserError, one_line

#: Values that share a magnitude.
BLOCK = 64
#: Values that are packed at a time: what is needed besides is a few times as much.
_PIECE = 1 << 24
#: The 16 numbers: quantiles of a normal distribution, by which a kernel is checked.
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def packed_bytes(values: int) -> int:
    """Bytes of so many values: half a byte each, and four for each :data:`BLOCK`."""
    return values // 2 + 4 * (values // BLOCK)


class Nf4(nn.Module):
    """A matrix in four bits. It has no parameter, so that no optimizer sees it, and its magnitudes are held as the bits
    that they consist of, so that no cast of a module touches them.
    """

    codes: Tensor
    magnitudes: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        codes, magnitudes = _pack(weight)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("magnitudes", magnitudes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., columns] times the matrix, transposed: [..., rows]."""
        return _Product.apply(x, self.codes, self.magnitudes, self.shape)

    def whole(self) -> Tensor:
        """The matrix, multiplied out, in the type that it had."""
        return _unpack(self.codes, self.magnitudes, self.shape, self.dtype)


def rounded(weight: Tensor) -> Tensor:
    """What remains of a matrix that is held in four bits."""
    return Nf4(weight).whole()


def check_nf4(device: torch.device, dtype: torch.dtype) -> str:
    """Compare packing and unpacking on a device with what they should be; returns the name of who does it.

    Raises :class:`UserError` where they differ, or cannot be done.
    """
    version = _bitsandbytes().__version__
    weight = torch.randn(8, 4 * BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        found = rounded(weight).float()
    except RuntimeError as error:
        raise UserError(
            f"--load_in_4bit: bitsandbytes {version} does not run on {device} ({one_line(error)[:120]}): install one "
            "that does, or leave the flag out."
        ) from error
    blocks = weight.float().view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(_LEVELS, device=device)
    nearest = (blocks / largest).sub(levels[:, None, None]).abs().argmin(0)
    expected = (levels[nearest] * largest).view_as(found)
    off = float((found - expected).abs().max() / largest.max())
    if not off <= 2 * torch.finfo(dtype).eps:
        raise UserError(
            f"--load_in_4bit: bitsandbytes {version} computes other values than NF4's on {device}, {off:.1e} off: "
            "install another version, or leave the flag out."
        )
    return f"NF4 bitsandbytes {version}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, magnitudes: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(codes, magnitudes)
        ctx.shape = shape
        return nn.functional.linear(x, _unpack(codes, magnitudes, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,), (codes, magnitudes) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return grad @ _unpack(codes, magnitudes, ctx.shape, grad.dtype), None, None, None


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # not before: it takes seconds, and few runs need it
    except ImportError as error:
        raise UserError(
            f"--load_in_4bit needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, or "
            "leave the flag out, which takes 16 bits a weight."
        ) from error
    return bitsandbytes


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8, two in each, and magnitudes, int32 that are the bits of fp32; on the weight's device.

    Where there is an accelerator, it is done there.
    """
    functional, found = _bitsandbytes().functional, []
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for piece in weight.detach().reshape(-1).split(_PIECE):
        codes, state = functional.quantize_4bit(piece.to(place), blocksize=BLOCK, quant_type="nf4")
        found.append((codes.view(-1).to(weight.device), state.absmax.to(weight.device)))
    codes, magnitudes = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, magnitudes.view(torch.int32)


def _unpack(codes: Tensor, magnitudes: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes().functional
    state = functional.QuantState(
        magnitudes.view(torch.float32), shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    return functional.dequantize_4bit(codes.view(-1, 1), state)
