"""What became of all records of the inputs, from what the parts counted: the facts of a table's manifest."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fft.data.image_tallies import image_facts
from fft.data.lengths import histogram_of
from fft.data.manifest import Manifest, TokenizerInfo
from fft.data.part_files import Part, files_of, sum_tallies
from fft.data.row_tallies import TRAINED, by_dataset
from fft.errors import UserError
from fft.text.engines import ENGINES
from fft.text.records import RecordEncoder

#: Begins the tally of a key of records that nothing uses.
UNUSED = "unused "
#: What every way of encoding records counts; each may count more, see :attr:`RecordEncoder.tallies`.
COUNTED = ("documents_in", "documents_out", "empty", "quarantined", "checked")


def lineage_of(job: str, origins: Sequence[Mapping[str, Any]], parameters: Mapping[str, object]) -> dict[str, Any]:
    """What a manifest says about where its table comes from; counts and timing are added at the end.

    ``origins`` are what each input says of itself: its name as ``input``, with the version of a Delta table, a
    fingerprint, and what it was made of in turn.
    """
    inputs = list(dict.fromkeys(origin["input"] for origin in origins))
    return {"job": job, "inputs": inputs, "made_from": [dict(o) for o in origins], "parameters": dict(parameters)}


def timing_of(start: float, tokens: int) -> dict[str, float]:
    """Seconds since ``start``, a ``time.monotonic()``, and tokens a second."""
    seconds = time.monotonic() - start
    return {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / max(seconds, 1e-9))}


def finished_manifest(
    parts: Sequence[Part],
    lineage: Mapping[str, Any],
    counts: Mapping[str, Any],
    timing: Mapping[str, float],
    tokenizer: TokenizerInfo | None,
    seq_len: int | None,
    seed: int | None = None,
    vision: dict[str, Any] | None = None,
) -> Manifest:
    """The manifest of finished parts: ``counts``, and those that every table has, go into the lineage; and those of
    images, where ``vision`` says what was made of them."""
    files = files_of(parts)
    rows, tokens, size = (sum(getattr(file, name) for file in files) for name in ("rows", "tokens", "bytes"))
    tallies = sum_tallies(parts)
    counts = {**counts, "rows": rows, "tokens": tokens, "bytes": size, "lengths": histogram_of(tallies)}
    if TRAINED in tallies:  # rows of other kinds, such as answers, have nothing to train on
        counts |= {"trained_tokens": tallies[TRAINED], "untrained_tokens": tokens - tallies[TRAINED]}
    if vision is not None:
        counts["vision"] = image_facts(tallies, vision["merge"])
    lineage = {**lineage, "counts": {**counts, "seconds": timing["seconds"]}, "timing": dict(timing)}
    return Manifest(files, rows, tokens, tokenizer, seq_len, seed, lineage, vision=vision)


def documents_manifest(
    parts: Sequence[Part],
    lineage: Mapping[str, Any],
    counts: Mapping[str, Any],
    timing: Mapping[str, Any],
    tokenizer: TokenizerInfo | None,
    max_len: int | None,
    encoder: RecordEncoder,
) -> Manifest:
    """The manifest of rows that an ``encoder`` has made of documents, of at most ``max_len`` tokens each; pairs, which
    are yet to be packed, have no such length."""
    length = None if encoder.pairs else max_len
    made = finished_manifest(parts, lineage, counts, timing, tokenizer, length, vision=encoder.vision)
    return replace(made, pairs=encoder.pairs)


def document_counts(tallies: Counter[str], inputs: Sequence[str], record_encoder: RecordEncoder[Any]) -> dict[str, Any]:
    """What became of all documents, and how much of each input is in the table.

    Raises :class:`UserError` when no document is left, and when the counts do not add up.
    """
    counts: dict[str, Any] = {name: tallies[name] for name in (*COUNTED, *record_encoder.tallies)}
    if counts["documents_in"] != counts["documents_out"] + counts["empty"] + counts["quarantined"]:
        raise UserError(f"the accounts do not balance ({counts}): this is a fault of the job; please report it.")
    if not counts["documents_out"]:
        long = f" ({counts['long_pairs']} longer than `max_len`)" if counts.get("long_pairs") else ""
        raise UserError(
            f"{', '.join(inputs)} holds no documents: {counts['empty']} are empty{long} and "
            f"{counts['quarantined']} malformed."
        )
    unused = {key.removeprefix(UNUSED): tallies[key] for key in sorted(tallies) if key.startswith(UNUSED)}
    return {**counts, "unused_keys": unused, "datasets": by_dataset(inputs, tallies)}


def engine_of(tallies: Mapping[str, int]) -> str:
    """The slowest engine that encoded a part."""
    return ENGINES[max(number for number in range(len(ENGINES)) if f"engine {number}" in tallies)]


def notes_on(manifest: Manifest, record_encoder: RecordEncoder[Any]) -> list[str]:
    """What the user should know about a table that was tokenized, a line each."""
    engine = manifest.lineage["engine"]
    slow = [f"warning: ids were made by Hugging Face {engine}; they are exact, but this is many times slower."]
    counts = manifest.lineage["counts"]
    unused = ", ".join(f"{key} ({count})" for key, count in counts["unused_keys"].items())
    left = [f"note: keys or columns of records that are not used, and in how many they are: {unused}."]
    notes = record_encoder.notes(counts)
    return [*(slow if engine != ENGINES[0] else ()), *notes, *(left if unused else ())]
