"""JSON lines as training data: tokenized once, by this machine's cores, into a token table that is kept.

The table is the one that ``spark_jobs/tokenize.py`` makes of the file, part by part and byte for byte: order, packing,
labels, resuming and provenance are those of any table. It lies in a folder named after what it depends on - the file's
content, the tokenizer, the chat template, how long rows may be - so it is found again while those stay the same, and a
run that is training from it keeps it when they change.

All ranks ask for it; one makes it, and the others wait, also those on other machines that share the folder. Needs
neither Spark nor torch.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fft.console import format_table, progress, say
from fft.corpus.accounts import document_counts, documents_manifest, engine_of, lineage_of, notes_on, timing_of
from fft.corpus.files import Source, kind_of, spans_of
from fft.corpus.readers import read_lines
from fft.corpus.splits import Split, deal
from fft.corpus.tokenize_parts import name_malformed, tokenize_part
from fft.data.commits import commit
from fft.data.manifest import Manifest, TokenizerInfo, is_hidden, or_unknown, read_manifest
from fft.data.owner import Owner, owned, staged_folder
from fft.data.part_files import Part, PartFolder, publish_parts, sum_tallies
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from fft.files import private_folder, write_atomically
from fft.json_text import json_value
from fft.text.chat import load_chat
from fft.text.formats import FORMATS, known_formats, mended
from fft.text.preference import SIDES, load_preference
from fft.text.pretrain import load_pretrain
from fft.text.records import Keys, Malformed, RecordEncoder, decode_record, load_json

#: Part of every folder's name: to be raised when the same inputs make another table.
_FORMAT = 2
_KEYS = Keys()


@dataclass(frozen=True)
class TextInput:
    """A file of JSON lines, and how its records become rows of at most ``max_len`` tokens where they are no texts."""

    path: Path
    task: str
    tokenizer: TokenizerInfo
    encoder: RecordEncoder[Any]
    parameters: dict[str, Any]

    @property
    def max_len(self) -> int | None:
        """Tokens of a row at most; None where texts are left whole."""
        return self.parameters["max_len"]

    @property
    def identity(self) -> str:
        """All but the file's content that its table depends on."""
        template, recipe = getattr(self.encoder, "template", None), self.encoder.recipe
        facts = {
            **{name: value for name, value in self.parameters.items() if name != "tokenizer"},
            "format": _FORMAT,
            "tokenizer": self.tokenizer.sha256,
            # What transformers made of the tokenizer's files; one that is written in Python has no text of its own.
            "recipe": ["" if recipe.slow else recipe.json, recipe.prefix, recipe.suffix, recipe.parse_special_tokens],
            "template": template and [template.source, template.special_tokens],
        }
        return json.dumps(facts, sort_keys=True, default=str)


def is_json_lines(path: str | Path) -> bool:
    """Whether a name is that of a file of JSON lines, compressed or not; a folder of that name is none."""
    return kind_of(Path(path)) == "json" and not Path(path).is_dir()


def text_input(path: Path, tokenizer: Path, max_len: int) -> TextInput:
    """Read the tokenizer for a file of JSON lines; its first record says whether they are chats, preferences or texts.

    Raises :class:`UserError` when there is no such file or tokenizer, or when the first record is none of these.
    """
    task = _task_of(path)
    parameters = {"task": task, "tokenizer": str(tokenizer), "id_key": _KEYS.id, "on_error": "fail"}
    if task in ("chat", "preference"):
        load = load_chat if task == "chat" else load_preference
        encoder, info = load(tokenizer, _KEYS.id, max_len)
        return TextInput(path, task, info, encoder, {**parameters, "max_len": max_len})
    encoder, info = load_pretrain(tokenizer, _KEYS, None, "auto", False)
    parameters |= {"max_len": None, "text_key": _KEYS.text, "eos": "auto", "parse_special_tokens": False}
    return TextInput(path, task, info, encoder, parameters)


def _task_of(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file of JSON lines, or a token table.")
    for number, line in enumerate(read_lines(str(path), 0, 0), 1):
        if not line.strip():
            continue
        try:
            record = load_json(decode_record(line))
        except Malformed as error:
            raise UserError(f"{path}, line {number}: {error}: mend it.") from error
        keys = set(record) if isinstance(record, dict) else set()
        chats = [form for form in FORMATS if form.fits(keys)]
        if chats and _KEYS.text in keys:
            read = " and ".join(chats[0].keys)
            raise UserError(
                f"{path}, line {number}: it has a text (key {_KEYS.text}) and a conversation ({read}): leave one out, "
                f"as jq -c 'del(.{_KEYS.text})' does."
            )
        if keys.issuperset(SIDES):
            return "preference"
        if isinstance(record, list) or chats:
            return "chat"
        if _KEYS.text in keys:
            return "pretrain"
        found = f"an object of {', '.join(sorted(keys)) or 'no keys'}" if isinstance(record, dict) else "no object"
        raise UserError(
            f"{path}, line {number}: {found}, where a text (key {_KEYS.text}) or a conversation (a list of turns, or "
            f"{known_formats()}) should be: {mended(sorted(keys))}, or make a table with spark_jobs/tokenize.py."
        )
    raise UserError(f"{path} holds no documents: it has no line that is not blank.")


def table_of(text: TextInput, cache: Path) -> Path:
    """The token table of a file, below the folder ``cache``; made there first if it is not there yet.

    Every process of a machine may ask at once. Raises :class:`UserError` for a malformed record, by file and line, when
    no document is left, and when ``cache`` cannot be written to.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with owned(cache / f".{_stem(text.path)}.lock", str(cache), wait=True) as owner:
            seen = _seen(text.path)  # before its content is read for the first time
            folder = cache / f"{_stem(text.path)}-{_key(text, seen, cache)}"
            if not _is_whole(folder):
                _make(text, seen, folder, owner)
            return folder
    except OSError as error:
        raise UserError(f"{cache} cannot hold the tokens of {text.path} ({error}): make room, or permit it.") from error


def scratch_cache() -> Path:
    """A folder of this user in the machine's temporary one, for runs that have no folder of their own.

    Raises :class:`UserError` when it cannot be made, and when somebody else has made it: what lies there cannot be
    trusted.
    """
    try:
        return private_folder("fft-tokens")
    except OSError as error:
        raise UserError(
            f"no temporary folder can hold tokens ({error}): make room, or give the run a folder (--checkpoint)."
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether a table is there with all of its files, of which a temporary folder's cleaner may have removed some."""
    manifest = read_manifest(folder)
    there = [file for file in folder.glob("*.parquet") if not is_hidden(Path(file.name))]
    sizes = {file.name: file.stat().st_size for file in there}
    return manifest is not None and sizes == {file.path: file.bytes for file in manifest.files}


def _stem(path: Path) -> str:
    """What the names of a file's table, lock and note begin with; short enough for any file system."""
    return re.sub(r"[^\w.-]", "_", path.name.partition(".")[0])[:40] or "text"


def _key(text: TextInput, seen: list[str | int], cache: Path) -> str:
    """A short hash of the file's content and of all else that its table depends on.

    The file is not read again while its size and its time of change stay as they were noted.
    """
    note = cache / f".{_stem(text.path)}.content"
    try:
        known = dict(json_value(note.read_bytes())) if note.is_file() else {}
    except (ValueError, TypeError):  # whatever somebody has put there
        known = {}
    if known.get("seen") != seen:
        with open(text.path, "rb") as stream:
            known = {"seen": seen, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        write_atomically(note, json.dumps(known))
    return hashlib.sha256(f"{known['sha256']} {text.identity}".encode()).hexdigest()[:12]


def _seen(path: Path) -> list[str | int]:
    """What tells one state of a file from another without reading it."""
    facts = path.stat()
    return [str(path.absolute()), facts.st_size, facts.st_mtime_ns, facts.st_ino]


def _make(text: TextInput, seen: list[str | int], folder: Path, owner: Owner) -> None:
    with staged_folder(folder, owner) as staging:
        manifest = _tokenize(text, staging)
        owner.check()  # before the manifest, which would appear in what another has begun
        if _seen(text.path) != seen:  # it would be found again under the hash of what the file held before
            raise UserError(f"{text.path} was changed while it was tokenized: run again when it is whole.")
        commit(staging, manifest)


def _tokenize(text: TextInput, folder: Path) -> Manifest:
    begin = time.monotonic()
    name = str(text.path)
    source = Source.of_file(text.path, "json")
    splits = deal(spans_of([source], text.encoder))
    target, done = PartFolder(folder.absolute(), WorkerNotes(str(folder.absolute()))), []
    with progress(f"tokenize {name}", lambda: (len(done), splits[-1].part + 1)):
        for part in _write_parts(text.encoder, target, splits):
            done.append(part)
        parts = publish_parts(target, done)
    tallies = sum_tallies(parts)
    counts = document_counts(tallies, [name], text.encoder)
    lineage = {**lineage_of("tokenize", [source.origin], text.parameters), "engine": engine_of(tallies)}
    timing = timing_of(begin, counts["datasets"][name]["tokens"])
    manifest = documents_manifest(parts, lineage, counts, timing, text.tokenizer, text.max_len, text.encoder)
    for note in notes_on(manifest, text.encoder):
        say(note)
    tokens = [manifest.tokens, or_unknown(manifest.trained_tokens), or_unknown(manifest.untrained_tokens)]
    row = [name, counts["documents_out"], manifest.rows, *tokens, timing["tokens_per_second"]]
    header = (f"{text.task} data", "documents", "rows", "tokens", "trained", "untrained", "tokens/s")
    say(format_table(header, [row]))
    return manifest


def _write_parts(encoder: RecordEncoder[Any], target: PartFolder, splits: list[Split]) -> Iterator[Part]:
    """Every part by one of as many processes as there are cores."""
    own: dict[int, list[Split]] = {}
    for split in splits:
        own.setdefault(split.part, []).append(split)
    cores = min(len(os.sched_getaffinity(0)), len(own))
    # Not forked: this process may have threads, and a trainer's libraries, that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    try:
        with watched, ProcessPoolExecutor(cores, context, _end_with, (watched,)) as pool, held:
            tasks = [pool.submit(tokenize_part, encoder, target, part, theirs) for part, theirs in own.items()]
            for task in as_completed(tasks):
                yield task.result()
            pool.shutdown()
    except UserError as error:
        remedy = "mend it, or make a table with spark_jobs/tokenize.py --on_error quarantine."
        raise name_malformed(error, encoder, remedy) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{splits[0].path}: a process that tokenized it was killed (out of memory?): make a table with "
            "spark_jobs/tokenize.py."
        ) from error


def _end_with(watched: Connection) -> None:
    """In a worker: end when the other end of a pipe is closed, by the parent, or because that was killed.

    A worker of the pool would finish its part first, and wait for ever for another one from a parent that is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well

    def watch() -> None:
        watched.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
