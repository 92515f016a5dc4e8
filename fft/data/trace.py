"""Which documents a training step saw, and at which steps a document was seen: from the order alone, without a log.

python -m fft.data.trace --train_data runs/packed/train --seq_len 2048 --global_batch 64 --step 1200
python -m fft.data.trace --train_data runs/packed/train --seq_len 2048 --global_batch 64 --doc_id wiki/17 --epochs 2
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa

from fft.data.blend import Blend, parse_tables
from fft.data.document_ids import id_lists, names_of
from fft.data.image_batches import run_rules
from fft.data.known import DATASET, DOC_IDS, GRIDS, IMAGES
from fft.data.order import LANES
from fft.data.reader import SampleReader
from fft.data.samples import Samples, TableSamples
from fft.data.table import Rows, Table
from fft.errors import Parser, UserError, run_cli


@dataclass(frozen=True)
class Seen:
    """Tokens [start, stop) of a document, counted from where the row's stretch of it begins, in a sample of a step.

    ``dataset`` is the one that the document says, else the ``table``. ``images`` are those among them, separated by
    blanks: "1x54x72:316074" is one of so many tiles, patches high and wide, and of so many bytes. They are looked at
    where the reader was told of images.
    """

    step: int
    sample: int
    epoch: int
    dataset: str
    doc_id: str
    start: int
    stop: int
    file: str
    row_group: int
    row: int
    images: str = ""
    table: str = ""


def documents_of_step(reader: Samples, step: int, global_batch: int) -> Iterator[Seen]:
    """What step ``step`` (the first is 1) trained on, in the order of its samples."""
    known: dict[tuple[str, int], tuple[list[list[str]], list[list[str]]]] = {}  # samples of a step share row groups
    for sample in range((step - 1) * global_batch, step * global_batch):
        member, index = reader.member(sample)
        (spans,) = member.samples([index])
        for span, rows in spans:
            key = member.table.source, span.group
            if key not in known:
                known[key] = document_names(member.table, span.group), document_names(member.table, span.group, DATASET)
            for number, (begin, end) in enumerate(_documents(rows, span.row)):
                start, stop = max(begin, span.start), min(end, span.stop)
                if start < stop:
                    name, dataset = (names[span.row][number] if names else "" for names in known[key])
                    when = step, sample, index // member.samples_per_epoch
                    yield _seen(member.table, when, (name, dataset, begin, start, stop), (span.group, span.row), rows)


def steps_of_document(reader: Samples, doc_id: str, global_batch: int, epochs: int) -> Iterator[Seen]:
    """Every sample of the first ``epochs`` epochs that holds tokens of a document. Reads all of ``doc_ids`` once.

    Raises :class:`UserError` when no table has such a column, or such a document.
    """
    searched = [(number, member) for number, member in enumerate(reader.members) if DOC_IDS in member.table.columns]
    paths = ", ".join(member.table.path for member in reader.members)
    if not searched:
        raise UserError(f"{paths} has no column doc_ids: only tables that fft's jobs wrote can be searched by id.")
    found = False
    for number, member in searched:
        for group, row, dataset, (begin, end), rows in _named(member, doc_id):
            found = True
            for own in _samples_with(reader, number, epochs * reader.samples_per_epoch, (group, row, begin, end)):
                for span in member.spans_of(own):
                    start, stop = max(begin, span.start), min(end, span.stop)
                    if (span.group, span.row) == (group, row) and start < stop:
                        sample = reader.index(number, own)
                        when = sample // global_batch + 1, sample, own // member.samples_per_epoch
                        document = (doc_id, dataset, begin, start, stop)
                        yield _seen(member.table, when, document, (group, row), rows)
    if not found:
        raise UserError(f"{paths} holds no document with the id {doc_id!r}.")


def _named(member: TableSamples, doc_id: str) -> Iterator[tuple[int, int, str, tuple[int, int], Rows]]:
    """Row group, row, dataset and tokens [begin, end) of the documents of that id, and the row group's rows."""
    table, images = member.table, (GRIDS, IMAGES) if member.rules else ()
    for group in range(len(table.row_groups)):
        if not any(doc_id in names for names in _ids(table, group)):
            continue
        rows = table.check(group, table.load(group, more=images), rules=member.rules)
        datasets = document_names(table, group, DATASET)
        for row, names in enumerate(document_names(table, group)):
            if doc_id in names:
                of = datasets[row] if datasets else [""] * len(names)
                for name, dataset, where in zip(names, of, _documents(rows, row), strict=True):
                    if name == doc_id:
                        yield group, row, dataset, where, rows


def _samples_with(reader: Samples, number: int, limit: int, where: tuple[int, int, int, int]) -> Iterator[int]:
    """A table's samples, among the first ``limit`` of all, that hold some of (row group, row, begin, end)."""
    member = reader.members[number]
    for epoch in itertools.count():
        first = epoch * member.samples_per_epoch
        # A lane may be ahead of others, but its own samples come in turn.
        if min(reader.index(number, first + lane) for lane in range(member.lanes)) >= limit:
            return
        for own in member.samples_with(epoch, *where):
            if reader.index(number, own) < limit:
                yield own


def _seen(
    table: Table, when: tuple[int, int, int], document: tuple[str, str, int, int, int], at: tuple[int, int], rows: Rows
) -> Seen:
    """Of (step, sample, epoch) and (name, dataset, begin, start, stop), counted in the row, ``at`` (row group, row)."""
    (name, dataset, begin, start, stop), (group, row) = document, at
    where, first = table.row_groups[group], int(rows.offsets[row])
    images = _images(rows, first + start, first + stop)
    place = Path(where.path).name, where.index, row
    return Seen(*when, dataset or table.path, name, start - begin, stop - begin, *place, " ".join(images), table.path)


def _images(rows: Rows, start: int, stop: int) -> Iterator[str]:
    images = rows.images
    if images is not None and images.files is not None:
        for number in images.among(start, stop):
            yield f"{'x'.join(map(str, images.grids[number]))}:{images.files[number].as_buffer().size}"


def _documents(rows: Rows, row: int) -> list[tuple[int, int]]:
    """Begin and end of each document in a row."""
    ends = rows.document_ends(row, 0, int(rows.offsets[row + 1] - rows.offsets[row]))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def document_names(table: Table, group: int, column: str = DOC_IDS) -> list[list[str]]:
    """An id, or what another column of texts has, for each of a row's documents that have tokens, "" without one;
    nothing for a table without such a column.

    As repartition reads them: ids that are not one a document name all of a row by the first.
    """
    ids = _ids(table, group, column)
    if not ids or "cu_seqlens" not in table.columns:
        return [[(names[0] if names else None) or ""] for names in ids]
    found = []
    for names, bounds in zip(ids, _column(table, group, "cu_seqlens").to_pylist(), strict=True):
        own = names if len(names) == len(bounds) - 1 else (names[:1] or [None]) * (len(bounds) - 1)
        found.append([name or "" for name, a, b in zip(own, bounds, bounds[1:], strict=False) if a < b])
    return found


def _ids(table: Table, group: int, column: str = DOC_IDS) -> list[list[str | None]]:
    """What a column of texts holds; nothing for a table without it."""
    if column not in table.columns:
        return []
    where = table.row_groups[group].path
    return names_of(id_lists(_column(table, group, column), where, column))


def _column(table: Table, group: int, name: str) -> pa.Array:
    return table.row_groups[group].columns([name], table.filesystem).column(name).combine_chunks()


def _is_parquet(file: Path) -> bool:
    """Whether a file of any name begins as parquet does."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = Parser(
        prog="python -m fft.data.trace",
        description=(__doc__ or "").split("\n\n")[0] + " Prints tab-separated lines.",
        epilog="examples:\n" + (__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("--train_data", required=True, metavar="TABLE", help="the run's table (PATH@v12: a version)")
    parser.add_argument("--seq_len", type=int, required=True, help="the run's tokens of a sample")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed (default: 0)")
    parser.add_argument("--pack", choices=("cut", "best-fit"), default="cut", help="the run's --pack (default: cut)")
    parser.add_argument(
        "--shuffle_lanes", type=int, default=LANES, help=f"the run's --shuffle_lanes (default: {LANES})"
    )
    parser.add_argument(
        "--blend_end", choices=("repeat", "drop"), default="repeat", help="the run's --blend_end (default: repeat)"
    )
    parser.add_argument(
        "--global_batch",
        type=int,
        required=True,
        help="samples of an optimizer step: replicas x gradient_accumulation_steps x per_device_train_batch_size",
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--step", type=int, help="show the documents of this step, the first of which is 1")
    wanted.add_argument("--doc_id", help="show where this document was seen")
    parser.add_argument("--epochs", type=int, default=1, help="with --doc_id: look through this many (default: 1)")
    return parser


def main() -> None:
    """Command line. Raises :class:`UserError` for numbers below 1 and tables that cannot be read."""
    args = build_parser().parse_args()
    for name in ("seq_len", "shuffle_lanes", "global_batch", "step", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1.")
    tables = parse_tables(args.train_data, "train_data")
    for path, _ in tables:
        if Path(path).is_file() and not _is_parquet(Path(path)):
            raise UserError(f"--train_data {path} is no table: give the one that the run made of it, RUN/tokens/...")
    readers = [
        SampleReader(Table.open(path), args.seq_len, args.seed, pack=args.pack, lanes=args.shuffle_lanes)
        for path, _ in tables
    ]
    rules = run_rules([reader.table for reader in readers])
    if rules is not None:
        readers = [reader.with_images(rules) for reader in readers]
    reader = readers[0] if len(readers) == 1 else Blend(readers, [weight for _, weight in tables], args.blend_end)
    if args.step is not None:
        seen = documents_of_step(reader, args.step, args.global_batch)
    else:
        seen = steps_of_document(reader, args.doc_id, args.global_batch, args.epochs)
    out = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    out.writerow([field.name for field in fields(Seen)])
    for one in seen:
        out.writerow([getattr(one, field.name) for field in fields(Seen)])


if __name__ == "__main__":
    run_cli(main)
