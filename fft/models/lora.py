"""Which parameters are trained: all, all but frozen ones, or low-rank adapters alone (LoRA, arXiv 2106.09685).

An adapter adds ``scale * B @ A`` to the weight W of a linear layer, A [r, inputs] and B [outputs, r]; ``scale`` is
``alpha / r`` or, rank-stabilised (rsLoRA, arXiv 2312.03732), ``alpha / sqrt(r)``. With DoRA (arXiv 2402.09353) the rows
of the sum V are brought to lengths that are trained, ``m / |V| * V``, where no gradient goes through ``|V|``. All of
this is done to a model on the meta device, before it is cut; names of the model's own parameters stay.

**Dropout** of an adapter's input must be the same on every layout, or what a run learns would depend on it. So nothing
is drawn: each token of the run's order has a number r, hashed from ``--seed``, its sample and its place in that, and
each column of an A a number f, hashed from the name of its layer (:mod:`fft.data.draws`). A value is dropped where
``r * f``, in 32 bits, is among the lowest. Both numbers are odd and uniform, and so is the product along rows and
columns. Those of tokens travel with the hidden states: a sequence-parallel rank has its tokens', a tensor-parallel one
its part's columns', a recomputation what the forward had; another step or epoch, whose samples have other numbers, has
others.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fft.data.draws import column_draws
from fft.errors import UserError
from fft.models.four_bits import FrozenLinear
from fft.parallel.tensor import TensorParallel
from fft.parallel.tensor_plan import LENGTHS, Shard
from fft.train_arguments import LORA_MODULES, TrainArguments

#: Names of an adapter's matrices, A and B, within its linear layer.
DOWN, UP = "lora_A", "lora_B"
#: That of DoRA's lengths.
MAGNITUDE = LENGTHS


@dataclass(frozen=True)
class Lora:
    """Adapters of rank ``rank`` on the linear layers with these last names, of decoder layers; ``PART.NAME`` are those
    within a part of the model that sees images, such as ``visual.qkv``.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @classmethod
    def of(cls, args: TrainArguments) -> "Lora | None":
        """What the flags ask for."""
        if not args.lora_dim:
            return None
        names = tuple(name.strip() for name in args.lora_module_name.split(","))
        return cls(args.lora_dim, args.lora_alpha, names, args.lora_dropout, args.use_rslora, args.use_dora)

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def guidance(self) -> str:
        """What is known of good settings, a line."""
        return (
            f"adapters of rank {self.rank}, multiplied by {self.scale:.3g}: a good rate is about ten times that of "
            "full training, whatever the rank; raise the rank where more is to be learned than adapters hold, as by "
            "continued pretraining (Schulman et al. 2025, thinkingmachines.ai/blog/lora)"
        )


class LoraLinear(FrozenLinear):
    """A linear layer with an adapter; the layer's own weight and bias are frozen. ``path`` is its name in the model.

    It drops where it was given ``draws``, int32 [tokens], see the module. Of DoRA's ``|V|``, where ranks share the
    columns of V, ``total`` makes the sum over them of a tensor, in place.
    """

    def __init__(self, linear: nn.Linear, lora: Lora, path: str = "") -> None:
        super().__init__(linear)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, lora.rank, bias=False, **like)
        self.lora_B = nn.Linear(lora.rank, linear.out_features, bias=False, **like)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(linear.out_features, **like)) if lora.dora else None
        self.scale, self.dropout, self.path = lora.scale, lora.dropout, path
        self.draws: Tensor | None = None
        self.total: Callable[[Tensor], Tensor] | None = None
        self._columns = torch.from_numpy(column_draws(path, linear.in_features)) if lora.dropout else None

    def hold(self, shard: Shard, total: Callable[[Tensor], Tensor]) -> None:
        """Have the columns that a tensor-parallel rank has of A, of which ``shard`` is its part; see the class."""
        self.total = total
        if self._columns is not None:
            self._columns = shard.of(self._columns.expand(shard.shape))[0].clone()

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Of the rows of V, [outputs], without V: its squares are those of W, of ``scale * B @ A`` and between.

        In fp32, float64 for a float64 model. Collective where there is a ``total``.
        """
        weight, down = self.whole(), self.lora_A.weight
        squares = row_lengths(weight) ** 2
        wide = squares.dtype
        up = self.lora_B.weight.to(wide)
        between = 2 * self.scale * (weight @ down.T).to(wide) + self.scale**2 * (up @ (down @ down.T).to(wide))
        squares = squares + (between * up).sum(1)
        return (squares if self.total is None else self.total(squares)).clamp(min=0).sqrt()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., inputs] -> [..., outputs]. Raises :class:`UserError` where it drops of other rows than a
        micro-batch's tokens."""
        seen = input if self.draws is None else self._thinned(input, self.draws)
        added = self.scale * self.lora_B(self.lora_A(seen))
        if self.lora_magnitude_vector is None:
            return super().forward(input) + added
        plain = self.product(input)
        lengths = self.lengths()
        factor = (self.lora_magnitude_vector.to(lengths.dtype) / lengths).to(plain.dtype)
        if seen is input:
            output = factor * (plain + added)
        else:  # as PEFT: what DoRA changes of W's own product is of the thinned input, too
            output = plain + (factor - 1) * self.product(seen) + factor * added
        return output if self.bias is None else output + self.bias

    def _thinned(self, input: Tensor, draws: Tensor) -> Tensor:
        if self._columns is None or input.numel() != len(draws) * input.shape[-1]:
            raise UserError(
                f"--lora_dropout: {self.path} is given other rows than the {len(draws)} tokens of a micro-batch: leave "
                "it out of --lora_module_name, or the dropout."
            )
        if self._columns.device != input.device:
            self._columns = self._columns.to(input.device)
        return input.masked_fill(dropped(draws, self._columns, self.dropout).view_as(input), 0) / (1 - self.dropout)


def dropped(draws: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Which values of a matrix are dropped, bool [tokens, columns], by the numbers of its rows and columns, int32."""
    return draws[:, None] * columns < round(rate * (1 << 32)) - (1 << 31)


def dropping(module: nn.Module) -> tuple[LoraLinear, ...]:
    """The adapters below ``module`` that drop something."""
    return tuple(child for child in module.modules() if isinstance(child, LoraLinear) and child.dropout)


def hold_columns(module: nn.Module, shards: Mapping[str, Shard], ranks: TensorParallel) -> None:
    """Tell the adapters below ``module``, whose matrices are parts, which columns these have; see
    :func:`fft.parallel.tensor.parallelise`.
    """
    for name, child in module.named_modules():
        down = shards.get(f"{name}.{DOWN}.weight")
        if isinstance(child, LoraLinear) and down is not None and down.dim == 1:
            child.hold(down, ranks.all_reduce)


def row_lengths(weight: Tensor) -> Tensor:
    """Of the rows of a matrix, in fp32, or in float64 for such a one: what DoRA's lengths begin with."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


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
    if lora.dropout and (seeing := sorted(name for name in lora.modules if "." in name)):
        raise UserError(
            f"--lora_dropout: {seeing[0]} of --lora_module_name sees patches, which are no tokens of a sample: leave "
            "it out, or the dropout."
        )
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
            setattr(parent, _last(path), LoraLinear(module, lora, path))


def adapted(model: nn.Module) -> str:
    """A regular expression of the names of what has adapters, and of nothing else in ``model``, as PEFT takes it."""
    paths = [re.escape(path) for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    return "|".join(sorted({re.sub(r"(?<=\.)\d+(?=\\)", r"\\d+", path) for path in paths}))


def is_adapter(path: str) -> bool:
    """Whether a module of this name is one of an adapter's matrices, or a parameter its lengths."""
    return _last(path) in (DOWN, UP, MAGNITUDE)


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
        if isinstance(module, LoraLinear) and module.lora_magnitude_vector is not None:
            with torch.no_grad():
                module.lora_magnitude_vector.copy_(row_lengths(module.whole()))


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
