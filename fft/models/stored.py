"""How files store a model's parameters: what transformers' own conversion of checkpoints says of a model type.

transformers keeps, for every type, renamings and conversions from a checkpoint's tensors to a model's parameters, and
applies them backwards when it saves. They are read here, not run: what a conversion does is known by its operations, so
that pieces of parameters can be read, and written, without the rest.
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, Transpose, WeightConverter, WeightRenaming, rename_source_key

from fft.errors import UserError
from fft.models.lora import is_adapter
from fft.parallel.tensor_plan import swap
from fft.weights.names import StoredNames, StoredRows

#: Operations of conversions from parameters to what is stored.
_CUT = "Chunk(dim=0)"
_UNSTACK, _SPLIT, _JOIN = "SplitModulelist(dim=0)", "Chunk(dim=1)", "Concatenate(dim=0)"


def stored_names(model: PreTrainedModel) -> StoredNames:
    """How transformers stores the parameters and buffers of ``model``, which may be on the meta device.

    Raises :class:`UserError` for a conversion that is not known here.
    """
    # A prefix that some files have is not written, unless it was read: transformers does not know it of a new model.
    forth = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    back = [transform.reverse_transform() for transform in reversed(forth)]
    renamings = [t for t in back if isinstance(t, WeightRenaming)]
    converters = [t for t in back if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    pieces: dict[str, tuple[StoredRows, ...]] = {}
    joined: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if is_adapter(name.removesuffix(".weight")):
            continue
        converted, pattern = rename_source_key(name, [], converters, reverse=True)
        if pattern is None:
            renamed = rename_source_key(name, renamings, [])[0]
            if renamed != name:
                pieces[name] = (StoredRows(renamed, shape),)
            continue
        converter = by_pattern[pattern]
        kind = [repr(operation) for operation in converter.operations]
        if kind == [_JOIN]:
            key = rename_source_key(converted, renamings, [])[0]
            joined.setdefault(key, []).append((converter.source_patterns.index(pattern), name, shape))
            continue
        if _is_swap(converter, shape):
            key = rename_source_key(converted, renamings, [])[0]
            pieces[name] = (_swapped(name, key, shape),)
            continue
        first, *others = converter.target_patterns
        names = [converted, *(converted.replace(first, other, 1) for other in others)]
        if kind == [_CUT]:
            stored = list(zip(names, _rows(model, name, shape[0], len(names)), strict=True))
        elif len(shape) > 1 and kind == ([_SPLIT, _UNSTACK] if others else [_UNSTACK]):
            numbered = [key.replace("*", str(number), 1) for number in range(shape[0]) for key in names]
            stored, shape = [(key, shape[1] // len(names)) for key in numbered], shape[1:]
        else:
            raise UserError(
                f"{name} of model type {model.config.model_type!r} is stored in a form that is not known here ("
                f"{', '.join(kind)}): use another model."
            )
        pieces[name] = tuple(
            StoredRows(rename_source_key(key, renamings, [])[0], (rows, *shape[1:])) for key, rows in stored
        )
    return StoredNames(pieces | _joined(joined))


def _is_swap(converter: WeightConverter, shape: tuple[int, ...]) -> bool:
    """Whether a parameter's last two dimensions are stored the other way around."""
    operation = converter.operations[0]
    alone = len(converter.operations) == len(converter.target_patterns) == 1
    return (
        alone
        and isinstance(operation, Transpose)
        and len(shape) > 2
        and ({operation.dim0 % len(shape), operation.dim1 % len(shape)} == {len(shape) - 2, len(shape) - 1})
    )


def _swapped(name: str, key: str, shape: tuple[int, ...]) -> StoredRows:
    """Raises :class:`UserError` for a parameter of which nobody can tell whether it is swapped."""
    if shape[-1] == shape[-2]:
        raise UserError(
            f"{name} has as many rows as columns, {shape[-1]}, and files of such models have these swapped, or not, "
            "which nothing tells: use a model of other sizes."
        )
    return StoredRows(key, swap(shape), swapped=True)


def _rows(model: PreTrainedModel, name: str, rows: int, count: int) -> list[int]:
    """Rows of the ``count`` tensors that are kept one after the other in a parameter: equally many, but for the
    convolutions of linear attention, whose values may be wider than queries and keys.
    """
    says = vars(model.get_submodule(name.rpartition(".")[0].rpartition(".")[0]))
    if {"key_dim", "value_dim"} <= says.keys() and count == 3:
        return [says["key_dim"], says["key_dim"], says["value_dim"]]
    return [rows // count] * count


def _joined(found: dict[str, list[tuple[int, str, tuple[int, ...]]]]) -> dict[str, tuple[StoredRows, ...]]:
    """Parameters of which several make one stored tensor, one after the other."""
    pieces: dict[str, tuple[StoredRows, ...]] = {}
    for stored, members in found.items():
        start, total = 0, sum(shape[0] for _, _, shape in members)
        for _, name, shape in sorted(members):
            pieces[name] = (StoredRows(stored, (total, *shape[1:]), ((start, start + shape[0]),)),)
            start += shape[0]
    return pieces
