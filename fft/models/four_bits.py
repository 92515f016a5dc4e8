"""Which weights ``--load_in_4bit`` holds in four bits: those of the linear layers of decoder layers, which are frozen.

Embedding, head, norms, routers, experts that are one parameter together, and all that sees images stay as they are.
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor, nn

from fft.errors import UserError
from fft.ops.nf4 import BLOCK, Nf4, rounded
from fft.parallel.tensor_plan import Shard

#: What says which experts a token goes to, or how much of one is taken.
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))


class FrozenLinear(nn.Linear):
    """A linear layer whose own weight is not trained: as it is or, if it ``packs`` and :meth:`pack` was called, in four
    bits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.packs = False
        self.packed: Nf4 | None = None

    def pack(self) -> None:
        """Hold the weight in four bits from now on, which then is no parameter any more."""
        self.packed = Nf4(self.weight)
        self.register_parameter("weight", None)

    def product(self, input: Tensor) -> Tensor:
        """Without the bias: ``input`` [..., inputs] -> [..., outputs]."""
        return nn.functional.linear(input, self.weight) if self.packed is None else self.packed(input)

    def whole(self) -> Tensor:
        """The weight as products see it, [outputs, inputs]."""
        return self.weight if self.packed is None else self.packed.whole()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., inputs] -> [..., outputs]."""
        if self.packed is None:
            return super().forward(input)
        output = self.product(input)
        return output if self.bias is None else output + self.bias


def hold_in_four_bits(model: nn.Module, layers: str) -> frozenset[str]:
    """Have the linear layers below ``layers``, the name of a model's decoder layers, pack their weights when these are
    there; returns the names of the weights.

    Raises :class:`UserError` where there are none.
    """
    found = set()
    for path, module in [*linear_layers(model, layers)]:
        if not isinstance(module, FrozenLinear):
            above, _, name = path.rpartition(".")
            module = FrozenLinear(module)
            setattr(model.get_submodule(above), name, module)
        module.packs = True
        found.add(f"{path}.weight")
    if not found:
        raise UserError("--load_in_4bit: the decoder layers of this model have no linear layers: leave it out.")
    return frozenset(found)


@torch.no_grad()
def round_weights(model: nn.Module, layers: str) -> None:
    """Give the weights that would be packed the values that they would have."""
    for _, module in linear_layers(model, layers):
        module.weight.copy_(rounded(module.weight))


def linear_layers(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Linear]]:
    """Paths and modules of the linear layers below ``layers`` whose weights are packed."""
    for path, module in model.named_modules():
        if not path.startswith(f"{layers}.") or _ROUTERS.intersection(path.split(".")):
            continue
        if (type(module) is nn.Linear or isinstance(module, FrozenLinear)) and not module.weight.requires_grad:
            yield path, module


def check_blocks(packed: frozenset[str], shards: Mapping[str, Shard], size: int) -> None:
    """Raise :class:`UserError` where one of ``size`` tensor-parallel ranks would have other blocks of 64 values of a
    weight in ``packed`` than the whole weight has; ``shards`` are what a rank has of parameters.
    """
    for name in sorted(packed & shards.keys()):
        shard = shards[name]
        inner = prod(shard.shape[shard.dim + 1 :])
        if any(end * inner % BLOCK for span in shard.spans for end in span):
            raise UserError(
                f"--load_in_4bit: --model_parallel_size {size} leaves a rank {shard.local_shape[1]} of the "
                f"{shard.shape[1]} inputs of {name} and {shard.local_shape[0]} of its {shard.shape[0]} outputs, which "
                f"cuts blocks of {BLOCK} values: lower it, and raise --pipe_parallel_size instead."
            )
