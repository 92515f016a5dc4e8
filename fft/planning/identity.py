"""What a run trains, in a few hashes: config and weights of its model, tokenizer, tables.

They are cheap: of a tensor its name, its shape and a row are read, of a table its footers and some bytes of its files.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fft.data.manifest import tokenizer_sha256
from fft.data.samples import Samples
from fft.data.table import Table
from fft.weights.files import opened
from fft.weights.hf import WeightReader

#: What an identity consists of.
IDENTITY = ("config", "weights", "adapter", "tokenizer", "train_data", "eval_data")
#: Entries of a config that say where it comes from, or in which type its weights were written.
_ORIGIN = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}
#: At most so many tensors of a model and files of a table, evenly spaced, are looked into.
_TENSORS, _FILES = 1024, 16
#: Elements of a tensor's row that are read; bytes of each of a file's parts.
_ROW, _BYTES, _PARTS = 512, 8192, 8


def identity_of(
    config: PretrainedConfig,
    weights: WeightReader | None,
    tokenizer: str | None,
    train: Samples | None,
    evaluations: Collection[Samples],
) -> dict:
    """What these are, as JSON has it: a map of the config's entries, else a hash each; None for what is not.

    The same for equal weights in files of another number, and for equal tables elsewhere. Raises :class:`UserError` for
    weights that cannot be read.
    """
    return {
        "config": config_entries(config),
        "weights": weights and weights_hash(weights.directory),
        "tokenizer": tokenizer and tokenizer_sha256(tokenizer)[:16],
        "train_data": train and data_hash(train),
        "eval_data": data_hash(*evaluations) if evaluations else None,
    }


def differences(before: Mapping, now: Mapping) -> Iterator[tuple[str, object, object]]:
    """What differs between two identities: its name, ``config.KEY`` for an entry of the config, and both values."""
    for name in IDENTITY:
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from ((f"config.{k}", a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k))
        elif a != b:
            yield name, a, b


def config_entries(config: PretrainedConfig) -> dict:
    """All entries of a config that make the model, also those that have their defaults."""
    entries = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in entries.items() if name not in _ORIGIN}


def weights_hash(directory: Path) -> str:
    """A hash of the names and shapes of a model directory's tensors and of a row in the middle of each.

    Raises :class:`UserError` for a file that cannot be read.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    places = sorted((name, file) for file in files for name in _names(file))
    looked_into = {name for name, _ in places[:: -(-len(places) // _TENSORS) or 1]}
    found = []
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                stored = tensors.get_slice(name)
                found.append((name, list(stored.get_shape()), _row(stored) if name in looked_into else ""))
    return _hash(sorted(found))


def _names(file: Path) -> list[str]:
    with opened(file) as tensors:
        return list(tensors.keys())


def _row(stored: Any) -> str:
    """A hash of the beginning of a row of a stored tensor."""
    shape = stored.get_shape()
    if not shape or not min(shape):
        return ""
    middle = tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])
    return hashlib.sha256(stored[(*middle, slice(0, _ROW))].float().numpy().tobytes()).hexdigest()


def data_hash(*data: Samples) -> str:
    """A hash of the tables' fingerprints and of some bytes of their files."""
    return _hash([(table.fingerprint, _table_bytes(table)) for one in data for table in one.tables])


def _table_bytes(table: Table) -> list[str]:
    """Hashes of some bytes of some files of a table."""
    paths, found = sorted({group.path for group in table.row_groups}), []
    for path in paths[:: -(-len(paths) // _FILES)]:
        with table.filesystem.open_input_file(path) as file:
            last = max(0, file.size() - _BYTES)
            starts = sorted({last * part // _PARTS for part in range(_PARTS + 1)})
            found.append(hashlib.sha256(b"".join(file.read_at(_BYTES, start) for start in starts)).hexdigest())
    return found


def _hash(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
