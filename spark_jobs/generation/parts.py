"""What tasks do: answer the prompts of parts, and write them. Parts that are finished already are passed over."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fft.corpus.accounts import UNUSED
from fft.corpus.splits import Split
from fft.data.part_files import Part, PartFile, PartFolder, RejectFile
from fft.text.records import Malformed
from spark_jobs.generation.answers import Answered, Asking, answer_chunks
from spark_jobs.generation.engine import Loaded, worker_engine
from spark_jobs.generation.fields import Fields
from spark_jobs.generation.prompts import Chunk, read_chunks
from spark_jobs.runtime.tasks import by_part, part_to_row
from spark_jobs.token_table.kept import find_part, keep_part


class AnswerFile(PartFile):
    """A part of rows of answers."""

    def tokens_of(self, batch: pa.RecordBatch) -> np.ndarray:
        """Tokens of each answer."""
        return batch.column("tokens").to_numpy()

    def tally(self, rows: pa.Table) -> Counter[str]:
        """Nothing: lengths of documents are those of token tables."""
        return Counter()


@dataclass(frozen=True)
class _End:
    """The end of a part."""

    part: int


@dataclass(frozen=True)
class GenerateParts:
    """A function for ``mapInArrow``: batches of splits in, each part's prompts are answered and written.

    With ``fail``, the first malformed row ends the job; else it is set aside.
    """

    asking: Asking
    fields: Fields
    target: PartFolder
    fail: bool

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Do all parts of a task."""
        items = self._items(batches)
        for item in items:
            if isinstance(item, Part):
                yield part_to_row(item)
                continue
            with worker_engine(self.asking.wanted) as loaded:
                yield from map(part_to_row, self._write(loaded, itertools.chain([item], items)))

    def _items(self, batches: Iterator[pa.RecordBatch]) -> Iterator[Chunk | _End | Part]:
        for part, rows in by_part(batches):
            found = find_part(self.target, part)
            if found is not None and not (self.fail and found.rejects):  # made when such rows were set aside
                for _ in rows:
                    continue
                yield found
            else:
                for chunk in self._chunks(part, rows):
                    if self.target.notes.failed():  # another task: its error ends the job
                        return
                    yield chunk
                yield _End(part)

    def _chunks(self, part: int, rows: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
        splits = [Split(**row) for batch in rows for row in batch.select(_SPLIT).to_pylist()]
        return read_chunks(part, splits, self.fields, self.asking.keys)

    def _write(self, loaded: Loaded, items: Iterator[Chunk | _End | Part]) -> Iterator[Part]:
        starts = int(loaded.started)
        with ExitStack() as opened:
            sink: _Sink | None = None
            for item in answer_chunks(loaded, self.asking, items):
                if isinstance(item, Part):
                    yield item
                    continue
                number = item.part if isinstance(item, _End) else item.chunk.part
                sink = sink or opened.enter_context(_Sink(self, number, loaded.engine.name))
                if isinstance(item, Answered):
                    sink.add(item)
                    continue
                yield sink.finish(starts)
                opened.pop_all().close()
                sink, starts = None, 0


#: The columns of a split; what else a task's batches have is Spark's business.
_SPLIT = [*Split.__dataclass_fields__]


class _Sink:
    """A part that is being written, with its accounts."""

    def __init__(self, work: GenerateParts, part: int, engine: str) -> None:
        self._work, self._engine = work, engine
        self._file, self._rejects = AnswerFile(work.target, part), RejectFile(work.target, part)
        self._tallies: Counter[str] = Counter()

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *reason: object) -> None:
        self._file.__exit__(*reason)
        self._rejects.__exit__(*reason)

    def add(self, answered: Answered) -> None:
        if self._work.fail:
            answered.check()
        for row, place in zip(answered.rows, answered.chunk.places, strict=True):
            self._tallies["prompts_in"] += 1
            if isinstance(row, Malformed):
                self._tallies["quarantined"] += 1
                self._rejects.add(str(place), str(row), place.record)
                continue
            asked, answers = row
            self._tallies.update({"prompts_out": 1, "prompt_tokens": asked.tokens})
            self._tallies.update({f"{UNUSED}{key}": count for key, count in asked.unused.items()})
            self._tallies.update(f"finished {answer.finish_reason}" for answer in answers)
        logprobs = self._work.asking.sampling.logprobs is not None
        self._file.write(answered.table(self._work.fields, logprobs))

    def finish(self, starts: int) -> Part:
        """The part, which outlives the job from now on; ``starts`` engines were started for it."""
        tallies = {**self._tallies, "engine_starts": starts, f"engine {self._engine}": 1}
        part = self._file.finish(tallies, self._rejects.finish())
        keep_part(self._work.target, part)
        return part
