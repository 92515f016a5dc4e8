"""Finished parts that outlive their job, for work that is dear: the same command, given again, goes on from them.

They wait in ``_finished/WORK`` in the output, where no reader looks. WORK names all that decides what is in them, so
other work never takes them for its own. Beside each lies a small file of its facts, written last: a part without one is
unfinished.
"""

import json
import posixpath
from collections.abc import Collection, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from fft.data.part_files import QUARANTINE, Part, PartFolder
from fft.data.storage import Storage
from fft.data.worker_notes import WRITING

#: The folder, in that of a table, of parts that wait for the rest.
FINISHED = "_finished"


def place_of(work: str) -> str:
    """Where parts of this work wait, relative to the output; "" for work whose parts are not kept."""
    return f"{FINISHED}/{work}" if work else ""


def find_part(target: PartFolder, part: int) -> Part | None:
    """A part that is finished already."""
    try:
        return _load(target.storage, _facts(target.kept, part))
    except FileNotFoundError:
        return None


def keep_part(target: PartFolder, part: Part) -> None:
    """Have a part outlive its job. Of two tries that finish the same one, the last is kept."""
    target.storage.write(_facts(target.kept, part.part), json.dumps(asdict(part)))


def waiting(folder: str | Path) -> dict[str, int]:
    """How many parts of which work wait in an output."""
    place = Storage.at(folder).below(FINISHED)
    return {name: len(_named(place.below(name), "part-*.json")) for name, size in place.here().items() if size is None}


def settle_parts(place: Storage, work: str, published: Collection[str]) -> None:
    """Leave in an output what waits for this ``work``, whole, and nothing else. For who owns the output.

    Parts that a job had begun to publish go back to where they waited; ``published`` are the names of those that a
    table has.
    """
    for other, size in place.below(FINISHED).here().items():
        if size is None and other != work:
            place.delete_folder(f"{FINISHED}/{other}")
    inside, named = place_of(work), set()
    for facts in _named(place.below(inside), "part-*.json") if work else ():
        part = _load(place, f"{inside}/{facts}")
        if _bring_back(place, inside, part, published):
            named |= {part.name, part.rejects}
        else:
            place.delete([f"{inside}/{facts}"])
    if work:
        unfinished = [name for name in _named(place.below(inside), f".*{WRITING}") if name not in named]
        place.below(inside).delete(unfinished)
    _drop_empty(place, inside)


def take_back(target: PartFolder, renames: Mapping[str, str], published: Collection[str]) -> None:
    """What a job that fails has begun to publish waits again, and what it has not finished goes."""
    place, waits = target.storage, target.storage.below(target.kept)
    for source, final in renames.items():
        if posixpath.basename(final) not in published and place.exists(final):
            place.move(final, source)
    parts = [_load(waits, facts) for facts in _named(waits, "part-*.json")]
    named = {name for part in parts for name in (part.name, part.rejects)}
    waits.delete([name for name in _named(waits, f".part-*{target.tag}.*{WRITING}") if name not in named])
    _drop_empty(place, target.kept)


def _drop_empty(place: Storage, inside: str) -> None:
    for folder in (inside, FINISHED):  # but where a part waits
        if folder:
            place.below(folder).delete_empty()


def _bring_back(place: Storage, inside: str, part: Part, published: Collection[str]) -> bool:
    """Whether all files of a part are where they wait, after those that are not were looked for."""
    waits = place.below(inside).here()
    if part.name and part.name not in waits:
        sizes = place.here()
        names = [name for name in _named(place, f"part-{part.part:05d}*.parquet") if name not in published]
        found = next((name for name in names if sizes[name] == part.bytes), None)
        if found is None:
            return False
        if part.rejects and part.rejects not in waits:
            aside = f"{QUARANTINE}/{PurePosixPath(found).stem}.json"
            if not place.exists(aside):
                return False
            place.move(aside, f"{inside}/{part.rejects}")
        place.move(found, f"{inside}/{part.name}")
    return not part.rejects or place.exists(f"{inside}/{part.rejects}")


def _named(place: Storage, pattern: str) -> list[str]:
    """Files of a folder with names of a kind."""
    return sorted(name for name, size in place.here().items() if size is not None and fnmatchcase(name, pattern))


def _facts(inside: str, part: int) -> str:
    return posixpath.join(inside, f"part-{part:05d}.json")


def _load(place: Storage, facts: str) -> Part:
    return Part(**json.loads(place.fetch(facts)))
