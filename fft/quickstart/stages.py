"""Run stages one after the other, each skipped when its result stands and what it was made from has not changed."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fft.errors import UserError
from fft.files import remove_file, write_atomically
from fft.quickstart.places import Lake, Place


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    ``work`` makes ``outputs`` from ``inputs`` (files or folders) and returns facts to remember. ``command`` is what it
    does as a user would type it; with the inputs it decides whether the stage has to run again.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    work: Callable[[], dict]


@dataclass(frozen=True)
class Record:
    """What is known of a finished stage. ``seconds`` is its whole duration, ``facts`` what its work returned."""

    command: list[str]
    inputs: str
    outputs: str
    seconds: float
    facts: dict


def run_stages(stages: Sequence[Stage], records: Path, log: Callable[[str], None]) -> dict[str, Record]:
    """Run what is not done yet; returns every stage's record by name.

    ``records`` is the folder of one small JSON file a stage, written after the stage's outputs.
    """
    records.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    finished: dict[str, Record] = {}
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        path = records / f"{stage.name}.json"
        inputs = fingerprint(stage.inputs)
        record = read_record(path)
        if record is not None and _stands(record, stage, inputs):
            log(f"{label}: already done ({record.seconds:.1f} s)")
        else:
            remove_file(path)
            log(f"{label} ... ({clock(time.monotonic() - started)} elapsed)\n    {shlex.join(stage.command)}")
            begin = time.monotonic()
            facts = stage.work()
            seconds = time.monotonic() - begin
            record = Record(list(stage.command), inputs, fingerprint(stage.outputs), seconds, facts)
            write_atomically(path, json.dumps(asdict(record), indent=1))
            log(f"{label}: done in {seconds:.1f} s")
        finished[stage.name] = record
    return finished


def read_record(path: Path) -> Record | None:
    """The record at ``path``; None when there is none or it cannot be understood."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def fingerprint(paths: Sequence[Place]) -> str:
    """Changes when a file at or below ``paths`` appears, vanishes, or changes its size or time of modification."""
    digest = hashlib.sha256()
    for path in paths:
        if isinstance(path, Lake):
            digest.update(f"{path}\0{path.states() or 'absent'}\n".encode())
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat() if file.exists() else None
            facts = (stat.st_size, stat.st_mtime_ns) if stat else "absent"
            digest.update(f"{file}\0{facts}\n".encode())
    return digest.hexdigest()


def run_command(stage: str, command: Sequence[str], root: Path, variables: Mapping[str, str]) -> None:
    """Run a command in ``root`` with this environment's ``bin`` first on PATH; all it prints goes to stderr, live.

    Raises :class:`UserError` naming stage, command and exit code when it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, **variables, "PATH": path}
    try:
        code = subprocess.run(command, cwd=root, env=environment, stdout=sys.stderr.fileno()).returncode
    except FileNotFoundError as error:
        raise UserError(f"stage {stage}: {command[0]} is not installed: run make env.") from error
    if code:
        raise UserError(
            f"stage {stage} failed: `{shlex.join(command)}` ended with exit code {code}; see above for why."
        )


def clock(seconds: float) -> str:
    """``83.2`` -> ``1:23``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _stands(record: Record, stage: Stage, inputs: str) -> bool:
    same = record.command == list(stage.command) and record.inputs == inputs
    return same and all(map(_exists, stage.outputs)) and record.outputs == fingerprint(stage.outputs)


def _exists(place: Place) -> bool:
    return bool(place.states()) if isinstance(place, Lake) else place.exists()
