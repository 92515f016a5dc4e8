"""What a piece of a step asks of a device, counted on any: launches, bytes, and what the host reads back.

Operators are seen by dispatch, so that the product's own code can be counted at real shapes on the meta device. A
launch is an operator that computes or moves something; its bytes are those of what it reads and of what it writes, a
dimension that is only expanded counting once. Reads are what makes the host wait until the device has done all that
was asked of it: values, lists and numbers of tensors, and operators whose result's shape depends on values.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Matrix products and attention, whose time is their arithmetic's.
PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::bmm",
        "aten::_flash_attention_forward",
        "aten::_flash_attention_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }
)
#: Operators that make room, or a view where schemas do not say so, and launch nothing.
_NOTHING = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")
)
#: Operators that the host waits for.
_WAITED_FOR = frozenset(f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"))
#: Methods that give the host a tensor's values without an operator.
_METHODS = ("tolist", "numpy")
#: Operators that write over what they are called on, unread.
_OVERWRITE = frozenset(f"aten::{name}" for name in ("copy_", "zero_", "fill_", "_foreach_zero_"))
#: Operators that touch of what they are called on no more than they are given indices for, or give.
_SPARSE = frozenset(
    f"aten::{name}"
    for name in ("gather", "index", "index_select", "embedding", "scatter_", "scatter_add_", "index_put_", "index_add_")
)


@dataclass(frozen=True)
class Launch:
    """An operator, what it reads and writes in bytes, and the elements of its largest tensor."""

    operator: str
    bytes: int
    elements: int

    @property
    def product(self) -> bool:
        """Whether arithmetic is what it takes time for."""
        return self.operator in PRODUCTS


@dataclass
class Counts:
    """The launches and the reads of some part of a step."""

    launches: list[Launch] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        """Of all launches but products, whose time is their arithmetic's."""
        return sum(launch.bytes for launch in self.launches if not launch.product)

    @property
    def products(self) -> int:
        """How many launches are products."""
        return sum(launch.product for launch in self.launches)

    def by_operator(self) -> dict[str, tuple[int, int]]:
        """Launches and bytes of each operator, most bytes first."""
        names = {launch.operator for launch in self.launches}
        own = {name: [launch.bytes for launch in self.launches if launch.operator == name] for name in names}
        return dict(sorted(((n, (len(b), sum(b))) for n, b in own.items()), key=lambda told: -told[1][1]))


class Counting(TorchDispatchMode):
    """Counts what runs while it is active. :meth:`part` says under which name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Counts] = {}
        self._names = ["all"]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs meanwhile, but for parts within, counts as ``name``'s."""
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()

    @property
    def counts(self) -> Counts:
        """Of the part that runs."""
        return self.parts.setdefault(self._names[-1], Counts())

    def __enter__(self) -> "Counting":
        self._methods = {name: getattr(Tensor, name) for name in _METHODS}
        for name, method in self._methods.items():
            setattr(Tensor, name, self._watched(name, method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, method in self._methods.items():
            setattr(Tensor, name, method)
        super().__exit__(*error)

    def _watched(self, name: str, method: Any) -> Any:
        def watched(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.counts.reads[name] += 1
            return method(tensor, *args, **options)

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _WAITED_FOR:
            self.counts.reads[name.removeprefix("aten::")] += 1
        elif name not in _NOTHING and not _is_view(func):
            self.counts.launches.append(_launch(func, args, kwargs or {}, result))
        return result


def _is_view(func: Any) -> bool:
    """Whether an operator's results are views: they alias an argument that it does not write to."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _launch(func: Any, args: tuple, kwargs: dict, result: Any) -> Launch:
    name, given = (
        func._schema.name,
        {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs},
    )
    unread = [kwargs["out"]] if "out" in kwargs else []
    if name in _OVERWRITE or kwargs.get("beta") == 0:
        unread += tree_leaves(args[0])
    if name in _SPARSE:
        # All but what it is called on is read; as much as the largest of that, or as is given, is touched there.
        rest = _tensors((args[1:], kwargs)) if name.endswith("_") else [*_tensors(args[1:]), *_tensors(result)]
        most = max(rest, key=Tensor.numel)
        return Launch(name, sum(map(moved, rest)) + moved(most), most.numel())
    read = [x for x in _tensors(given) if not any(x is y for y in unread)]
    changed = [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = _tensors(result)
    written += [x for x in _tensors(changed) if not any(x is y for y in written)]
    sizes = [x.numel() for x in (*read, *written)]
    return Launch(name, sum(map(moved, (*read, *written))), max(sizes, default=0))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def moved(tensor: Tensor) -> int:
    """Bytes of a tensor, each element that is there once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size
