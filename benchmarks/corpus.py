"""Text that every machine has: the Python sources of the running environment, as JSON lines."""

import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path


def source_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every Python source of the standard library and of the installed packages, in path order."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = {path for root in roots for path in root.rglob("*.py") if path.is_file()}
    for path in sorted(files):
        text = path.read_bytes().decode("utf-8", "ignore")
        if text.strip():
            yield str(path), text


def write_corpus(folder: Path, size: int, files: int) -> int:
    """Write at least ``size`` bytes of text into ``files`` JSON-lines files of equal size; returns the bytes of text.

    When the machine has less, it is repeated under other ids, each repetition from another line on, so that no
    document occurs twice. Nothing is written where a corpus of this size is already.
    """
    done = folder / f".complete-{size}-{files}"
    if done.exists():
        return int(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*.jsonl"):
        old.unlink()
    written = [0] * files
    with ExitStack() as stack:
        streams = [
            stack.enter_context(open(folder / f"part-{i:03d}.jsonl", "w", encoding="utf-8")) for i in range(files)
        ]
        for name, text in _endless():
            target = written.index(min(written))
            streams[target].write(json.dumps({"id": name, "text": text}) + "\n")
            written[target] += len(text.encode())
            if sum(written) >= size:
                break
    aside = done.with_suffix(".writing")
    aside.write_text(str(sum(written)))
    os.replace(aside, done)
    return sum(written)


def _endless() -> Iterator[tuple[str, str]]:
    for repetition in count():
        for name, text in source_texts():
            lines = text.splitlines(keepends=True)
            first = repetition % len(lines)
            yield f"{repetition}:{name}", "".join(lines[first:] + lines[:first])
