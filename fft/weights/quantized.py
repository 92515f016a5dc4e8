"""Quantized weights: FP8 with block scales, as DeepSeek and Qwen publish it, is multiplied out; nothing else is read.

Beside ``W.weight``, codes in float8_e4m3fn, such files hold ``W.weight_scale_inv``: what every block of
``weight_block_size`` codes is to be multiplied by. The last block of a row or column may be cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fft.errors import UserError
from fft.parallel.tensor_plan import Shard

#: What follows a weight's name in that of its scales.
_SCALE = "_scale_inv"
#: Types that are codes of something: by themselves they say nothing.
_CODES = (torch.int8, torch.uint8)
#: Settings of ``quantization_config`` that change nothing about a weight, or have these values.
_KNOWN: dict[str, tuple | None] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", None),
    "weight_block_size": None,
    "modules_to_not_convert": None,
    "ignored_layers": None,
    "dequantize": None,
}


@dataclass(frozen=True)
class BlockScales:
    """FP8 weights with a scale for every block of ``rows`` x ``columns``."""

    rows: int
    columns: int

    #: Where a config says it.
    SETTINGS: ClassVar[tuple[str, ...]] = ("quantization_config", "compression_config")

    @classmethod
    def of(cls, config: Mapping[str, object], where: str) -> "BlockScales | None":
        """What a model's config says of its weights; None where they are not quantized.

        Raises :class:`UserError` for what is quantized in another way.
        """
        found = next((config[name] for name in cls.SETTINGS if config.get(name)), None)
        if found is None:
            return None
        settings = found if isinstance(found, dict) else {"quant_method": found}
        block = settings.get("weight_block_size")
        other = [
            f"{name} {value!r}"
            for name, value in settings.items()
            if value is not None and (name not in _KNOWN or value not in (_KNOWN[name] or (value,)))
        ]
        rows, columns = block if isinstance(block, list | tuple) and len(block) == 2 else (0, 0)
        sizes = [n for n in (rows, columns) if type(n) is int and n > 0]
        if settings.get("quant_method") != "fp8" or other or len(sizes) < 2:
            said = other[0] if other else f"weight_block_size {block!r}"
            raise UserError(
                f"{where} is quantized ({said} in quantization_config of its config.json), which is not read: only FP8 "
                "with a weight_block_size is; give the model in bf16 or fp16."
            )
        return cls(rows, columns)

    @staticmethod
    def scales_of(name: str) -> str:
        """Name of the scales of a weight."""
        return name + _SCALE

    @staticmethod
    def fit(codes: Tensor) -> bool:
        """Whether a tensor of codes is one that such scales belong to."""
        return codes.dtype == torch.float8_e4m3fn and codes.ndim == 2

    def multiplied(self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        """The float32 values of ``codes``, which are all or a ``shard`` of a weight of ``shape``; ``scales`` are whole.

        Raises ValueError for scales of another shape or type.
        """
        grid = (-(-shape[0] // self.rows), -(-shape[1] // self.columns))
        if tuple(scales.shape) != grid or scales.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            found = f"{tuple(scales.shape)} of {scales.dtype}"
            raise ValueError(f"scales {found} where blocks of {self.rows} x {self.columns} need {grid}")
        at = [torch.arange(size) for size in shape]
        if shard is not None:
            at[shard.dim] = torch.cat([torch.arange(a, b) for a, b in shard.spans])
        return codes.float() * scales.float()[at[0] // self.rows][:, at[1] // self.columns]


def is_coded(tensor: Tensor) -> bool:
    """Whether a tensor's values are codes of a quantization."""
    return tensor.dtype in _CODES or (tensor.dtype.is_floating_point and tensor.dtype.itemsize < 2)
