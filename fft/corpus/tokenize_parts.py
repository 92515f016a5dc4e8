"""Records of a split to a part of a token table, and the accounts of what became of each."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fft.corpus.records import first_malformed
from fft.data.part_files import (
    PartFile,
    RejectFile,
    dataset_tallies,
)
from fft.errors import UserError
from fft.text.chat import Chat
from fft.text.encoder import Encoder
from fft.text.outcomes import DOCUMENT, EMPTY, MALFORMED
from fft.text.pretrain import Pretrain
from fft.text.records import Malformed

_MALFORMED_MARK = "malformed record: "


Records = Sequence[tuple[bytes | None, str | None]]


class PartTokenizer:
    """Encodes records into one part, and counts what becomes of them."""

    def __init__(self, job: Pretrain | Chat, encoder: Encoder, sink: PartFile, rejects: RejectFile | None) -> None:
        self._job, self._encoder, self._sink, self._rejects = job, encoder, sink, rejects
        self.tallies: Counter[str] = Counter()

    def add(self, records: Records, kind: str, dataset: str, source: str, numbered: bool = True) -> None:
        """Write the documents among ``records``, which are of a ``kind`` and come from ``source``, a file or a table.

        Without a :class:`RejectFile`, a malformed record raises :class:`UserError`; that of a file is ``numbered``:
        the driver finds its line.
        """
        documents, malformed = [], 0
        for record, doc_id in records:
            try:
                documents.append(self._job.parse(kind, record, doc_id))
            except Malformed as error:
                if self._rejects is None:
                    where = _MALFORMED_MARK + json.dumps([source, str(error)])
                    raise UserError(where if numbered else _malformed(f"{source}, id {doc_id}", str(error))) from error
                malformed += 1
                self._rejects.add(source, str(error), record)
        tokens = self._job.token_rows(documents, malformed, self._encoder)
        # Documents come first.
        kept = tokens.slice(0, int(np.count_nonzero(tokens.column("outcome").to_numpy() == DOCUMENT)))
        self._sink.write(kept.select(self._job.columns_out))
        ids = int(kept.column("input_ids").value_lengths().to_numpy().sum())
        self.tallies.update({"documents_in": len(records), **dataset_tallies(dataset, kept.num_rows, ids)})
        self.tallies.update(self._tallies_of(tokens))

    def _tallies_of(self, tokens: pa.RecordBatch) -> dict[str, int]:
        first = tokens.column("piece").to_numpy() == 0
        outcome = tokens.column("outcome").to_numpy()[first]
        kinds = {"documents_out": DOCUMENT, "empty": EMPTY, "quarantined": MALFORMED}
        counts = {name: int(np.count_nonzero(outcome == kind)) for name, kind in kinds.items()}
        sums = {name: int(tokens.column(column).to_numpy().sum()) for name, column in self._job.tallies}
        engines = {f"engine {number}": 1 for number in set(tokens.column("engine").to_pylist())}
        checked = int(tokens.column("checked").to_numpy().sum())
        return {**counts, **sums, **engines, "checked": checked}


def _located(error: UserError, job: Pretrain | Chat) -> UserError:
    text = str(error)
    if not text.startswith(_MALFORMED_MARK):
        return error
    file, reason = json.loads(text.removeprefix(_MALFORMED_MARK))
    return UserError(_malformed(first_malformed(file, job), reason))


def _malformed(where: str, reason: str) -> str:
    return f"{where}: {reason}: mend it, or give --on_error quarantine to set such records aside."
