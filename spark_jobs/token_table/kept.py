"""Finished parts that outlive their job: the same command, given again, goes on from them.

Each has a small file of its facts in ``_finished/WORK`` in the output, where no reader looks. WORK names all that
decides what is in the parts, see :mod:`spark_jobs.token_table.work`, so other work never takes them for its own. The
facts are written last: a part without them is unfinished. On a disk the files of parts wait beside their facts, under
hidden names; in a store they have their final names, and places, from the beginning.
"""

import json
import posixpath
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from fft.data.delta import latest_version
from fft.data.footer import each_of
from fft.data.part_files import QUARANTINE, Part, PartFolder
from fft.data.storage import Storage
from fft.data.worker_notes import WRITING
from fft.errors import StorageError, UserError

#: The folder, in that of a table, of what is known of parts that wait for the rest.
FINISHED = "_finished"
_FACTS = "part-*.json"
Sizes = Mapping[str, int | None]
#: What a job says there before it gives files their names: how they will end, and the version that it will replace.
_PUBLISHING = "publishing.json"


@dataclass(frozen=True)
class Settled:
    """What dead jobs have left: the parts that wait, by their numbers; how many ``dropped`` ones were other work's."""

    parts: Mapping[int, Part] = field(default_factory=dict)
    dropped: int = 0

    @property
    def in_place(self) -> set[str]:
        """Names of files that have their places in the table already, relative to it."""
        return {name for part in self.parts.values() for name in _files(part, "") if not _is_hidden(name)}


def place_of(work: str) -> str:
    """Where facts of parts of this work are, relative to the output; "" for work whose parts are not kept."""
    return f"{FINISHED}/{work}" if work else ""


def find_part(target: PartFolder, part: int) -> Part | None:
    """A part that is finished already."""
    try:
        return _load(target.storage.below(target.kept), _facts(part))
    except FileNotFoundError:
        return None


def keep_part(target: PartFolder, part: Part) -> Part:
    """Have a part outlive its job, where parts are kept. Of two tries that finish the same one, the last is kept."""
    if target.kept:
        target.storage.below(target.kept).write(_facts(part.part), json.dumps(asdict(part)))
    return part


def was_interrupted(error: UserError) -> bool:
    """Whether a job's error says that a storage or the engine has failed, and nothing of what the inputs hold."""
    return isinstance(error, StorageError) or not isinstance(error.__cause__, UserError | None)


def waiting(folder: str | Path) -> dict[str, int]:
    """How many parts of which work wait in the folder of a table."""
    place = Storage.at(folder).below(FINISHED)
    return {name: len(_named(place.below(name), _FACTS)) for name, size in place.here().items() if size is None}


def settle_parts(place: Storage, work: str, published: Collection[str]) -> Settled:
    """Leave in an output what waits for this ``work``, whole, and nothing else. For who owns the output.

    Parts that a job had begun to publish go back to where they waited; ``published`` are the names of those that a
    table has.
    """
    dropped, found = 0, {}
    for other, size in place.below(FINISHED).here().items():
        if size is None and other != work:
            dropped += len(_named(place.below(f"{FINISHED}/{other}"), _FACTS))
            place.delete_folder(f"{FINISHED}/{other}")
    inside = place_of(work)
    if work:
        waits = place.below(inside)
        _bring_back(place, inside, published)
        # A part that a table has was made by a job that had come to its end.
        there = {name: size for name, size in place.here().items() if name not in published}
        known, lying = _load_all(waits), (there, place.below(QUARANTINE).here(), waits.here())
        found = {part.part: part for part in known.values() if _is_whole(part, *lying)}
        named = {name for part in found.values() for name in _files(part, "")}
        useless = [facts for facts, part in known.items() if part.part not in found]
        waits.delete([*useless, *(name for name in _named(waits, f".*{WRITING}") if name not in named)])
    _drop_empty(place, inside)
    return Settled(found, dropped)


def begin_publishing(target: PartFolder) -> None:
    """To be called before files that wait get their names, so that they can be told from a table's."""
    waits = target.storage.below(target.kept)
    waits.write(_PUBLISHING, json.dumps({"suffix": target.suffix, "version": latest_version(target.storage)}))


def take_back(target: PartFolder, renames: Mapping[str, str], published: Collection[str]) -> set[str]:
    """What a job that fails has begun to publish waits again, and what it has not finished goes.

    The names of all files that wait, relative to the table.
    """
    place, waits = target.storage, target.storage.below(target.kept)
    for source, final in renames.items():
        if posixpath.basename(final) not in published and place.exists(final):
            place.move(final, source)
    parts = _load_all(waits).values()
    named = {name for part in parts for name in (part.name, part.rejects)}
    unfinished = [name for name in _named(waits, f".part-*{target.tag}.*{WRITING}") if name not in named]
    waits.delete([*unfinished, _PUBLISHING])
    _drop_empty(place, target.kept)
    return {name for part in parts for name in _files(part, target.kept)}


def drop_parts(target: PartFolder) -> None:
    """Remove all that waits for a job's work, which nobody will do again."""
    waits = target.storage.below(target.kept)
    names = {name for part in _load_all(waits).values() for name in _files(part, target.kept)}
    target.storage.delete(names)
    target.storage.delete_folder(target.kept)
    _drop_empty(target.storage, "")


def drop_all(place: Storage) -> None:
    """Remove all that waits in the folder of a table, whatever the work."""
    for name, size in place.below(FINISHED).here().items():
        if size is None:  # by itself: some stores keep folders within one that goes
            place.delete_folder(f"{FINISHED}/{name}")
    place.delete_folder(FINISHED)


def _drop_empty(place: Storage, inside: str) -> None:
    for folder in (inside, FINISHED):  # but where a part waits
        if folder:
            place.below(folder).delete_empty()


def _is_whole(part: Part, place: Sizes, aside: Sizes, waits: Sizes) -> bool:
    """Whether all files of a part are there, of what lies in the table's folder, is set aside there, and waits."""
    files = waits if _is_hidden(part.name) else place
    rejects = waits if _is_hidden(part.rejects) else aside
    return (not part.name or files.get(part.name) == part.bytes) and (not part.rejects or part.rejects in rejects)


def _bring_back(place: Storage, inside: str, published: Collection[str]) -> None:
    """Files to which a job that was killed has given their names, and that are no table's, wait again."""
    waits = place.below(inside)
    try:
        begun = json.loads(waits.fetch(_PUBLISHING))
    except FileNotFoundError:
        return
    if latest_version(place) == begun["version"]:  # else it has come to its end, and more may have been committed since
        here, there = place.here(), waits.here()
        aside = place.below(QUARANTINE).here()
        for part in _load_all(waits).values():
            final = f"part-{part.part:05d}{begun['suffix']}"
            name, rejects = f"{final}.parquet", f"{final}.json"
            if name in published:
                continue
            if _is_hidden(part.name) and part.name not in there and here.get(name) == part.bytes:
                place.move(name, f"{inside}/{part.name}")
            if _is_hidden(part.rejects) and part.rejects not in there and rejects in aside:
                place.move(f"{QUARANTINE}/{rejects}", f"{inside}/{part.rejects}")
    waits.delete([_PUBLISHING])


def _files(part: Part, inside: str) -> list[str]:
    """A part's files, relative to the table, in which those of hidden names wait ``inside``."""
    names = [part.name, part.rejects if _is_hidden(part.rejects) else f"{QUARANTINE}/{part.rejects}"]
    there = [name for name, own in zip(names, (part.name, part.rejects), strict=True) if own]
    return [posixpath.join(inside, name) if _is_hidden(name) else name for name in there]


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _named(place: Storage, pattern: str) -> list[str]:
    """Files of a folder with names of a kind."""
    return sorted(name for name, size in place.here().items() if size is not None and fnmatchcase(name, pattern))


def _facts(part: int) -> str:
    return f"part-{part:05d}.json"


def _load(waits: Storage, facts: str) -> Part:
    return Part(**json.loads(waits.fetch(facts)))


def _load_all(waits: Storage) -> dict[str, Part]:
    """All facts by the names of their files."""
    names = _named(waits, _FACTS)
    return dict(zip(names, each_of(partial(_load, waits), names), strict=True))
