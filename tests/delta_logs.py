"""Delta tables as other writers leave them, made by editing logs: features, deletion vectors, column mapping."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
#: Begins a serialized bitmap of Delta.
_MAGIC = 1681511377


def write_with_features(folder: Path, rows: pa.Table, *features: str) -> Path:
    """A table of one version whose protocol has these features."""
    deltalake.write_deltalake(str(folder), rows)

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7}
            action["protocol"] |= {"readerFeatures": [*features], "writerFeatures": [*features]}

    _edit(folder, change)
    return folder


def delete_rows(folder: Path, rows: Iterable[int]) -> None:
    """Commit version 1 of a table of one file: these rows of it are deleted, by a vector that stands in the log."""
    add = next(action["add"] for action in _actions(folder) if "add" in action)
    numbers = [*rows]
    values = b"".join(struct.pack("<H", row) for row in numbers)
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(numbers) - 1, 16) + values
    raw = struct.pack("<IqI", _MAGIC, 1, 0) + bitmap
    vector = {"storageType": "i", "pathOrInlineDv": _z85(raw + b"\0" * (-len(raw) % 4))}
    vector |= {"sizeInBytes": len(raw), "cardinality": len(numbers)}
    remove = {"path": add["path"], "dataChange": True, "deletionTimestamp": 1, "size": add["size"]}
    actions = [{"commitInfo": {"operation": "DELETE"}}, {"remove": remove}, {"add": add | {"deletionVector": vector}}]
    _log(folder, 1).write_text("\n".join(map(json.dumps, actions)))


def map_columns(folder: Path, names: Mapping[str, str]) -> None:
    """Have the columns of a table called otherwise than in its files."""

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in action:
            facts = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": str(len(names))}
            action["metaData"]["configuration"] = facts
            schema = json.loads(action["metaData"]["schemaString"])
            for number, column in enumerate(schema["fields"], 1):
                own = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": column["name"]}
                column |= {"name": names[column["name"]], "metadata": own}
            action["metaData"]["schemaString"] = json.dumps(schema)

    _edit(folder, change)


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    actions = _actions(folder)
    for action in actions:
        change(action)
    _log(folder, 0).write_text("\n".join(map(json.dumps, actions)))


def _actions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _log(folder, 0).read_text().splitlines()]


def _log(folder: Path, version: int) -> Path:
    return folder / "_delta_log" / f"{version:020}.json"


def _z85(data: bytes) -> str:
    words = [int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4)]
    return "".join(_DIGITS[word // 85**place % 85] for word in words for place in range(4, -1, -1))
