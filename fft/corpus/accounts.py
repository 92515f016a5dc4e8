"""What became of all records of the inputs, from what the parts counted: the facts of a table's manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from fft.data.lengths import histogram_of
from fft.data.manifest import Manifest, TokenizerInfo
from fft.data.part_files import Part, by_dataset, files_of, sum_tallies, total
from fft.errors import UserError
from fft.text.encoder import ENGINES
from fft.text.records import RecordEncoder

#: What every way of encoding records counts; each may count more, see :attr:`RecordEncoder.tallies`.
_COUNTED = ("documents_in", "documents_out", "empty", "quarantined", "checked")


def lineage_of(job: str, inputs: Sequence[object], parameters: Mapping[str, object]) -> dict[str, Any]:
    """What a manifest says about where its table comes from; counts and timing are added at the end."""
    return {"job": job, "inputs": [str(path) for path in inputs], "parameters": dict(parameters)}


def with_results(
    lineage: Mapping[str, Any], counts: Mapping[str, object], tokens: int, seconds: float
) -> dict[str, Any]:
    """Lineage of a finished table."""
    timing = {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / max(seconds, 1e-9))}
    return {**lineage, "counts": {**counts, "seconds": timing["seconds"]}, "timing": timing}


def tokenized(
    parts: Sequence[Part],
    lineage: Mapping[str, Any],
    record_encoder: RecordEncoder[Any],
    tokenizer: TokenizerInfo,
    seconds: float,
) -> Manifest:
    """The manifest of a table that was tokenized: files, ``counts`` of documents, tokens and lengths, the engine.

    ``lineage`` is what :func:`lineage_of` gave. Raises :class:`UserError` when no document is left, and when the counts
    do not add up.
    """
    files, tallies, inputs = files_of(parts), sum_tallies(parts), lineage["inputs"]
    size = total(files)
    counts: dict[str, Any] = {name: tallies[name] for name in (*_COUNTED, *record_encoder.tallies)}
    counts |= {"rows": size.rows, "tokens": size.tokens, "bytes": size.bytes}
    counts |= {"datasets": by_dataset(inputs, tallies), "lengths": histogram_of(tallies)}
    _check(counts, inputs)
    engine = ENGINES[max(number for number in range(len(ENGINES)) if f"engine {number}" in tallies)]
    results = with_results({**lineage, "engine": engine}, counts, size.tokens, seconds)
    max_len = lineage["parameters"]["max_len"]
    return Manifest(files, size.rows, size.tokens, tokenizer, seq_len=max_len, lineage=results)


def notes_on(manifest: Manifest, record_encoder: RecordEncoder[Any]) -> list[str]:
    """What the user should know about a table that was tokenized, a line each."""
    engine = manifest.lineage["engine"]
    slow = [f"warning: ids were made by Hugging Face {engine}; they are exact, but this is many times slower."]
    return [*(slow if engine != ENGINES[0] else ()), *record_encoder.notes(manifest.lineage["counts"])]


def _check(counts: Mapping[str, Any], inputs: Sequence[str]) -> None:
    if counts["documents_in"] != counts["documents_out"] + counts["empty"] + counts["quarantined"]:
        raise UserError(f"the accounts do not balance ({counts}): this is a fault of the job; please report it.")
    if not counts["documents_out"]:
        raise UserError(
            f"{', '.join(inputs)} holds no documents: {counts['empty']} are empty and "
            f"{counts['quarantined']} malformed."
        )
