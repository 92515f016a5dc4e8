"""Parameters under the names, and in the pieces, in which files have them.

For most models a parameter is one tensor of its name. Elsewhere it has another name; or its rows are those of several
tensors (experts, which modules hold as one parameter); or they are some rows of one tensor (projections that files keep
together). All are one thing: a parameter's rows, one after the other, are rows of stored tensors, whose columns may be
swapped with what is counted before them. Which they are is found in :mod:`fft.models.stored`; here is the arithmetic,
for reading parts, for writing, and for finding a stored tensor's values in the optimizer's state.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fft.parallel.tensor_plan import Shard, swap

Span = tuple[int, int]


@dataclass(frozen=True)
class StoredRows:
    """Rows ``spans`` of the stored tensor ``name`` of ``shape``, in this order; None: all of it.

    Rows are of the first dimension. Those of a parameter with more dimensions than ``shape`` are counted over its first
    ones together: [experts, rows, columns] has experts * rows. What is ``swapped`` is all of a parameter of three
    dimensions or more, of which files have the last two the other way around; ``shape`` is that in files.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...] | None = None
    swapped: bool = False

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of these rows in the parameter."""
        return (self.length, *(swap(self.shape) if self.swapped else self.shape)[1:])

    @property
    def ranges(self) -> tuple[Span, ...]:
        """The spans, also of a tensor that is whole; a number has one row."""
        return self.spans or ((0, self.shape[0] if self.shape else 1),)

    @property
    def length(self) -> int:
        """How many rows there are."""
        return sum(b - a for a, b in self.ranges)

    def between(self, first: int, last: int) -> tuple[Span, ...]:
        """Rows of the stored tensor that are ``first`` to ``last`` of the piece."""
        found, at = [], 0
        for a, b in self.ranges:
            low, high = max(first, at), min(last, at + b - a)
            if low < high:
                found.append((a + low - at, a + high - at))
            at += b - a
        return tuple(found)


@dataclass(frozen=True)
class Use:
    """``rows`` of a stored tensor are the rows of ``parameter`` from ``start`` on."""

    parameter: str
    start: int
    rows: StoredRows


@dataclass(frozen=True)
class Slice:
    """What is to be read of a stored tensor: its ``shard``, and of that, where both are cut, the columns ``within``."""

    rows: StoredRows
    shard: Shard | None
    within: Shard | None = None


class StoredNames:
    """By parameter, the pieces that make it, in the order of its rows; what is not named is stored as it is."""

    def __init__(self, pieces: Mapping[str, tuple[StoredRows, ...]]) -> None:
        self._pieces = pieces
        self._uses: dict[str, list[Use]] = {}
        for parameter, its in pieces.items():
            start = 0
            for piece in its:
                self._uses.setdefault(piece.name, []).append(Use(parameter, start, piece))
                start += piece.length

    def pieces(self, parameter: str) -> tuple[StoredRows, ...]:
        """What makes a parameter; empty for one that is stored as it is."""
        return self._pieces.get(parameter, ())

    def names(self, parameter: str) -> list[str]:
        """The tensors in files that hold a parameter."""
        return [piece.name for piece in self.pieces(parameter)] or [parameter]

    def uses(self, stored: str, shape: tuple[int, ...]) -> list[Use]:
        """Which parameters the rows of a stored tensor of ``shape`` belong to."""
        found = self._uses.get(stored)
        if found and found[0].rows.swapped and found[0].rows.own_shape == shape:  # it is stored as it is
            return [Use(found[0].parameter, 0, StoredRows(stored, shape))]
        return found or [Use(stored, 0, StoredRows(stored, shape))]

    def together(self, parameter: str) -> str:
        """The same for parameters that one stored tensor holds, which one rank must write."""
        return self.names(parameter)[0]

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters as they are stored, views of them where that can be.

        All parameters of a stored tensor are given, or none. Raises ValueError where some lack.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            start = 0
            for piece in self.pieces(name) or (StoredRows(name, tuple(tensor.shape)),):
                if piece.swapped:
                    stored[piece.name] = tensor.transpose(-1, -2)
                    continue
                own = tensor.reshape(-1, *piece.shape[1:])[start : start + piece.length]
                start += piece.length
                if piece.spans is None:
                    stored[piece.name] = own.view(piece.shape)
                elif piece.name not in stored:
                    stored[piece.name] = self._assemble(piece, tensors)
        return stored

    def _assemble(self, piece: StoredRows, tensors: Mapping[str, Tensor]) -> Tensor:
        """A stored tensor of which parameters have some of the rows."""
        uses = self.uses(piece.name, piece.shape)
        lacking = [use.parameter for use in uses if use.parameter not in tensors]
        if lacking:
            raise ValueError(f"{piece.name} cannot be written without {lacking[0]}")
        whole = tensors[uses[0].parameter].new_empty(piece.shape)
        for use in uses:
            own = tensors[use.parameter].reshape(-1, *piece.shape[1:])[use.start : use.start + use.rows.length]
            put(whole, use, own)
        return whole


def slices(pieces: Iterable[StoredRows], shape: tuple[int, ...], shard: Shard | None) -> list[Slice]:
    """What of stored tensors makes a parameter of ``shape``, or its ``shard``: concatenated, it has its rows.

    What is swapped is still to be swapped.
    """
    found, start = [], 0
    for piece in pieces:
        stop = start + piece.length
        if piece.swapped:
            return [Slice(piece, None if shard is None else shard.swapped())]
        leading = len(shape) - len(piece.shape) + 1  # dimensions that are counted together
        if shard is not None and shard.experts is not None:
            if piece == StoredRows(piece.name, shape):  # the parameter itself, by another name
                return [Slice(piece, shard)]
            if not _has_experts(shard.experts, start, stop, prod(shape[1:leading])):
                start = stop
                continue
        whole = None if piece.spans is None else Shard(piece.shape, 0, piece.spans)
        if shard is None:
            found.append(Slice(piece, whole))
        elif shard.dim < leading:
            spans = [
                span
                for a, b in _rows(shape[:leading], shard)
                for span in piece.between(max(a, start) - start, min(b, stop) - start)
            ]
            if spans:
                found.append(Slice(piece, Shard(piece.shape, 0, tuple(spans))))
        else:
            dim = shard.dim - leading + 1
            if whole is None:
                found.append(Slice(piece, Shard(piece.shape, dim, shard.spans)))
            else:
                found.append(Slice(piece, whole, Shard(whole.local_shape, dim, shard.spans)))
        start = stop
    return found


def _has_experts(experts: Span, start: int, stop: int, each: int) -> bool:
    """Whether rows ``start`` to ``stop`` are of ``experts``, which have ``each`` so many.

    Raises ValueError where some are and others are not.
    """
    first, last = (expert * each for expert in experts)
    inside = first <= start and stop <= last
    if not inside and max(first, start) < min(last, stop):
        raise ValueError(f"rows {start} to {stop} are of experts within and without {experts}")
    return inside


def _rows(leading: tuple[int, ...], shard: Shard) -> list[Span]:
    """The rows of a part, counted over the ``leading`` dimensions together."""
    inner = prod(leading[shard.dim + 1 :])
    step = leading[shard.dim] * inner
    return [
        (o * step + a * inner, o * step + b * inner) for o in range(prod(leading[: shard.dim])) for a, b in shard.spans
    ]


def put(whole: Tensor, use: Use, rows: Tensor) -> None:
    """Put ``rows`` of a parameter where they are in the ``whole`` stored tensor."""
    if use.rows.swapped:
        whole.copy_(rows.view(use.rows.own_shape).transpose(-1, -2))
    elif use.rows.spans is None:
        whole.copy_(rows.view(whole.shape))
    else:
        Shard(tuple(whole.shape), 0, use.rows.spans).put(whole, rows)


def taken(whole: Tensor, use: Use) -> Tensor:
    """What :func:`put` has put there: the rows of a parameter that are in the ``whole`` stored tensor."""
    if use.rows.swapped:
        return whole.transpose(-1, -2).reshape(use.rows.own_shape)
    if use.rows.spans is None:
        return whole.view(use.rows.own_shape)
    return Shard(tuple(whole.shape), 0, use.rows.spans).of(whole).reshape(use.rows.own_shape)
