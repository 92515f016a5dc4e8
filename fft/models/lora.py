"""Which parameters are trained: all, all but frozen ones, or low-rank adapters alone (LoRA, arXiv 2106.09685).

An adapter adds ``alpha / r * B @ A`` to the weight of a linear layer, A [r, inputs] and B [outputs, r]. All of this is
done to a model on the meta device, before it is cut; names of the model's own parameters stay.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fft.errors import UserError
from fft.train_arguments import LORA_MODULES, TrainArguments

#: Names of an adapter's matrices, A and B, within its linear layer.
DOWN, UP = "lora_A", "lora_B"


@dataclass(frozen=True)
class Lora:
    """Adapters of rank ``rank`` on the linear layers with these last names, of decoder layers; ``PART.NAME`` are those
    within a part of the model that sees images, such as ``visual.qkv``.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]

    @classmethod
    def of(cls, args: TrainArguments) -> "Lora | None":
        """What the flags ask for."""
        names = tuple(name.strip() for name in args.lora_module_name.split(","))
        return cls(args.lora_dim, args.lora_alpha, names) if args.lora_dim else None


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; the layer's own weight and bias are frozen."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        like = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, lora.rank, **like)
        self.lora_B = nn.Linear(lora.rank, linear.out_features, **like)
        self.scale = lora.alpha / lora.rank

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., inputs] -> [..., outputs]."""
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


def adapt(model: nn.Module, layers: str, lora: Lora, parts: tuple[str, ...] = ()) -> None:
    """Freeze ``model`` and put adapters on the linear layers below ``layers``, the name of its decoder layers, and
    below ``parts``, the names of those that see images.

    Raises :class:`UserError` for names that are none of theirs; of the default ones a model need not have all.
    """
    model.requires_grad_(False)
    places = {f"{layers}.": "", **{f"{part}.": f"{_last(part)}." for part in parts}}
    linear = [
        (place + _last(path), path, module)
        for path, module in model.named_modules()
        for prefix, place in places.items()
        if path.startswith(prefix) and isinstance(module, nn.Linear)
    ]
    known = {name for name, _, _ in linear}
    unknown = sorted(set(lora.modules) - known)
    if unknown and (",".join(lora.modules) != LORA_MODULES or not known & set(lora.modules)):
        where = "nothing that is trained" if "." in unknown[0] else "no decoder layer"
        raise UserError(
            f"--lora_module_name: {where} has a linear module {unknown[0]!r}: choose among {', '.join(sorted(known))}."
        )
    for name, path, module in linear:
        if name in lora.modules:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, _last(path), LoraLinear(module, lora))


def adapted(model: nn.Module) -> str:
    """A regular expression of the names of what has adapters, and of nothing else in ``model``, as PEFT takes it."""
    paths = [re.escape(path) for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    return "|".join(sorted({re.sub(r"(?<=\.)\d+(?=\\)", r"\\d+", path) for path in paths}))


def is_adapter(path: str) -> bool:
    """Whether a module of this name is one of an adapter's matrices."""
    return _last(path) in (DOWN, UP)


def reset_adapter(path: str, module: nn.Linear) -> None:
    """Initial values of an adapter's matrix, those of PEFT: A random, B zero, so that the model is as it was."""
    if _last(path) == DOWN:
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    else:
        nn.init.zeros_(module.weight)


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Give all adapters of a whole model the values that a run with this seed begins with."""
    for path, module in model.named_modules():
        if is_adapter(path) and isinstance(module, nn.Linear):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(path, seed))
                reset_adapter(path, module)


def seed_of(name: str, seed: int) -> int:
    """Of a module's initial values: they are the same however the model is cut."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def freeze(model: nn.Module, patterns: str) -> None:
    """Do not train parameters in whose names one of these regular expressions, split at commas, is found.

    Raises :class:`UserError` for one that is found in none, and where nothing remains to be trained.
    """
    for pattern in patterns.split(","):
        try:
            expression = re.compile(pattern.strip())
        except re.error as error:
            raise UserError(f"--freeze: {pattern!r} is no regular expression ({error}).") from error
        found = [p for name, p in model.named_parameters() if expression.search(name)]
        if not found:
            names = ", ".join(sorted({re.sub(r"\.\d+(?=\.)", ".0", n) for n, _ in model.named_parameters()}))
            raise UserError(f"--freeze: {pattern!r} is in no parameter's name; there are {names}.")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {patterns} leaves nothing to train: name fewer parameters.")


def trained(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values that are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
