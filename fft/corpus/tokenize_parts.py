"""Records of a split to a part of a token table, and the accounts of what became of each."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from fft.corpus.accounts import UNUSED
from fft.corpus.records import first_malformed, read_records
from fft.corpus.splits import MOST_BYTES, Split
from fft.data.part_files import Part, PartFile, PartFolder, RejectFile
from fft.data.row_tallies import dataset_tallies
from fft.errors import UserError
from fft.text.encoder import Encoder
from fft.text.records import Malformed, RecordEncoder

_MALFORMED_MARK = "malformed record: "
_REMEDY = 'mend it, or give `on_error="quarantine"` to set such records aside.'

#: Bytes of images that are held before they are written: a few row groups'.
_HELD_BYTES = 64 << 20

Records = Sequence[tuple[bytes | None, str | None]]


class RecordTokenizer:
    """Encodes records, and counts what becomes of them in ``tallies``, and in ``unused`` the keys (or columns) that
    nothing uses.

    ``write`` takes the rows of their documents; ``reject`` takes source, reason and record of those that are malformed,
    of which without it the first ends the work.
    """

    def __init__(
        self,
        record_encoder: RecordEncoder[Any],
        encoder: Encoder,
        write: Callable[[pa.RecordBatch], None],
        reject: Callable[[str, str, bytes | None], None] | None,
    ) -> None:
        self._record_encoder, self._encoder, self._to, self._reject = record_encoder, encoder, write, reject
        self.tallies: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def add(self, records: Records, kind: str, dataset: str, source: str, numbered: bool = True) -> None:
        """Write the documents among ``records``, which are of a ``kind`` and come from ``source``, a file or a table.

        Raises :class:`UserError` at a malformed record where nothing takes it; that of a file is ``numbered``: the
        driver finds its line, see :func:`name_malformed`.
        """
        documents, held = [], 0
        for record, doc_id in records:
            try:
                documents.append(self._record_encoder.parse(kind, record, doc_id, self.unused))
                held += self._record_encoder.held(documents[-1][0])
            except Malformed as error:
                if self._reject is None:
                    where = _MALFORMED_MARK + json.dumps([source, str(error)])
                    named = f"{source}, id {doc_id}".encode(errors="backslashreplace").decode()
                    raise UserError(where if numbered else _malformed(named, str(error))) from error
                self._reject(source, str(error), record)
                self.tallies["quarantined"] += 1
            if held >= _HELD_BYTES:
                self._write(documents, dataset)
                documents, held = [], 0
        self._write(documents, dataset)
        self.tallies["documents_in"] += len(records)
        if self._encoder.engine is not None:
            self.tallies[f"engine {self._encoder.engine}"] += 1

    def _write(self, documents: Sequence[tuple[Any, str]], dataset: str) -> None:
        rows, counts = self._record_encoder.token_rows(documents, self._encoder)
        self._to(rows)
        tokens = len(rows.column("input_ids").flatten())
        self.tallies.update(counts)
        self.tallies.update(dataset_tallies(dataset, rows.num_rows, tokens))

    def add_split(self, split: Split) -> None:
        """Read a split of a file and write its documents. Raises :class:`UserError` where it cannot be read."""
        for records in read_records(split, self._record_encoder, self.unused):
            self.add(records, split.kind, split.dataset, split.path)

    def close(self) -> Counter[str]:
        """All that was counted, the unused keys as well: once, at the end."""
        self.tallies.update({f"{UNUSED}{key}": count for key, count in self.unused.items()})
        return self.tallies


class PartTokenizer(RecordTokenizer):
    """Encodes records into one part; what is malformed goes to the ``rejects``, if there are any."""

    def __init__(
        self,
        record_encoder: RecordEncoder[Any],
        encoder: Encoder,
        sink: PartFile,
        rejects: RejectFile | None,
    ) -> None:
        super().__init__(record_encoder, encoder, sink.write, None if rejects is None else rejects.add)
        self._sink = sink

    def finish(self, rejects: str = "") -> Part:
        """Close the part; see :meth:`PartFile.finish`."""
        return self._sink.finish(self.close(), rejects)


def tokenize_part(record_encoder: RecordEncoder[Any], target: PartFolder, part: int, splits: Sequence[Split]) -> Part:
    """Encode splits of files into one part. Raises :class:`UserError` at the first malformed record."""
    with PartFile(target, part) as sink:
        tokenizer = PartTokenizer(record_encoder, Encoder(record_encoder.recipe), sink, None)
        for split in splits:
            tokenizer.add_split(split)
        return tokenizer.finish()


def name_malformed(
    error: UserError, record_encoder: RecordEncoder[Any], remedy: str = _REMEDY, most: int = MOST_BYTES
) -> UserError:
    """A worker's error about a malformed record as one about the first of its file, with line or row, which need not be
    the one that a worker met first; any other error as it is. Lines have fewer than ``most`` bytes. For the driver."""
    text = str(error)
    if not text.startswith(_MALFORMED_MARK):
        return error
    file, reason = json.loads(text.removeprefix(_MALFORMED_MARK))
    return UserError(_malformed(*(first_malformed(file, record_encoder, most) or (file, reason)), remedy))


def _malformed(where: str, reason: str, remedy: str = _REMEDY) -> str:
    return f"{where}: {reason}: {remedy}"
