"""How a family of checkpoints that transformers does not have is described: see :mod:`fft.weights.originals`."""

from collections.abc import Callable
from dataclasses import dataclass

#: Settings of code that comes with a model, and of how it was once run.
_OWN_CODE = (
    *("auto_map", "architectures", "tokenizer_class", "attn_implementation"),
    *("_name_or_path", "_from_model_config"),
)

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Original:
    """A family: what its config and tensors are in an architecture of transformers.

    ``config`` maps a ``config.json`` of one of the ``classes``. ``names`` are patterns of tensors and what they are
    called there; ``ignored`` are tensors that are computed. ``parts`` gives, by the config, the rows of each projection
    in the tensor that ``joined`` names. ``members`` are models within: the prefix of their tensors, the one that these
    have there, and the key of the config that is theirs, which ``config`` gets mapped already.
    """

    classes: tuple[str, ...]
    config: Callable[[dict], dict]
    names: tuple[tuple[str, str], ...]
    joined: str
    parts: Callable[[dict], dict[str, Spans]]
    ignored: str = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$"
    members: tuple[tuple[str, str, str], ...] = ()


def without_code(raw: dict, architecture: str) -> dict:
    """A config as that of an architecture, without what is said of code that comes with the model."""
    return {**{key: value for key, value in raw.items() if key not in _OWN_CODE}, "model_type": architecture}


def thirds(raw: dict, path: str = "self_attn") -> dict[str, Spans]:
    """Queries, keys and values, one after the other."""
    size = raw["hidden_size"]
    return {f"{path}.{part}_proj": ((i * size, (i + 1) * size),) for i, part in enumerate("qkv")}
