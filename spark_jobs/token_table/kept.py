"""Finished parts that outlive their job, for work that is dear: the same command, given again, goes on from them.

They wait in ``_finished/WORK`` in the output, where no reader looks. WORK names all that decides what is in them, so
other work never takes them for its own. Beside each lies a small file of its facts, written last: a part without one is
unfinished.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from fft.data.part_files import QUARANTINE, Part, PartFolder
from fft.data.worker_notes import WRITING
from fft.files import write_atomically

#: The folder, in that of a table, of parts that wait for the rest.
FINISHED = "_finished"


def place_of(work: str) -> str:
    """Where parts of this work wait, relative to the output; "" for work whose parts are not kept."""
    return f"{FINISHED}/{work}" if work else ""


def find_part(target: PartFolder, part: int) -> Part | None:
    """A part that is finished already."""
    try:
        return _load(_facts(target.parts, part))
    except FileNotFoundError:
        return None


def keep_part(target: PartFolder, part: Part) -> None:
    """Have a part outlive its job. Of two tries that finish the same one, the last is kept."""
    write_atomically(_facts(target.parts, part.part), json.dumps(asdict(part)))


def waiting(folder: Path) -> dict[str, int]:
    """How many parts of which work wait in an output."""
    return {place.name: len([*place.glob("part-*.json")]) for place in (folder / FINISHED).glob("*")}


def settle_parts(folder: Path, work: str, published: Collection[str]) -> None:
    """Leave in an output what waits for this ``work``, whole, and nothing else. For who owns the output.

    Parts that a job had begun to publish go back to where they waited; ``published`` are the names of those that a
    table has.
    """
    for other in (folder / FINISHED).glob("*"):
        if other.name != work:
            shutil.rmtree(other)
    place, named = folder / FINISHED / work, set()
    for facts in place.glob("part-*.json"):
        part = _load(facts)
        if _bring_back(folder, place, part, published):
            named |= {part.name, part.rejects}
        else:
            facts.unlink()
    for path in place.glob(f".*{WRITING}"):
        if path.name not in named:
            path.unlink()
    _drop_empty(place)


def take_back(target: PartFolder, renames: dict[Path, Path], published: Collection[str]) -> None:
    """What a job that fails has begun to publish waits again, and what it has not finished goes."""
    for source, final in renames.items():
        if final.name not in published and final.exists():
            os.replace(final, source)
    parts = [_load(facts) for facts in target.parts.glob("part-*.json")]
    named = {name for part in parts for name in (part.name, part.rejects)}
    for path in target.parts.glob(f".part-*{target.tag}.*{WRITING}"):
        if path.name not in named:
            path.unlink(missing_ok=True)
    _drop_empty(target.parts)


def _drop_empty(place: Path) -> None:
    with contextlib.suppress(OSError):  # where a part waits
        place.rmdir()
        if place.name != FINISHED:
            place.parent.rmdir()


def _bring_back(folder: Path, place: Path, part: Part, published: Collection[str]) -> bool:
    """Whether all files of a part are where they wait, after those that are not were looked for."""
    if part.name and not (place / part.name).exists():
        names = [path for path in folder.glob(f"part-{part.part:05d}*.parquet") if path.name not in published]
        found = next((path for path in names if path.stat().st_size == part.bytes), None)
        if found is None:
            return False
        if part.rejects and not (place / part.rejects).exists():
            aside = folder / QUARANTINE / f"{found.stem}.json"
            if not aside.exists():
                return False
            os.replace(aside, place / part.rejects)
        os.replace(found, place / part.name)
    return not part.rejects or (place / part.rejects).exists()


def _facts(place: Path, part: int) -> Path:
    return place / f"part-{part:05d}.json"


def _load(facts: Path) -> Part:
    return Part(**json.loads(facts.read_text()))
