"""What tables count of each dataset is what their documents have; every token's dataset is its document's."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.batches import micro_batch
from fft.data.blend import Blend
from fft.data.by_dataset import counted_names, dataset_names, dataset_numbers, summed, whole_datasets
from fft.data.document_ids import as_many, id_lists, of_rows
from fft.data.known import IGNORE
from fft.data.reader import SampleReader
from fft.data.row_tallies import by_dataset, datasets_of, tally_rows
from fft.data.table import Table
from fft.errors import UserError

NAMES = ("web", "books", "code")


def write(folder, rng, first, packed=True, named=True, labels=False):
    """A table whose token ``i`` is of dataset ``i % 3``, or of none; documents hold tokens of one alone."""
    folder.mkdir()
    rows, bounds, names = [], [], []
    for _ in range(40):
        lengths = rng.integers(1, 9, rng.integers(1, 4) if packed else 1)
        of = rng.integers(0, 3, len(lengths))
        documents = [first + 3 * rng.integers(0, 30, length) + own for length, own in zip(lengths, of, strict=True)]
        rows.append(np.concatenate(documents))
        bounds.append(np.cumsum([0, *lengths]))
        names.append([NAMES[own] for own in of])
    data = {"input_ids": pa.array(rows, pa.list_(pa.int32()))}
    if packed:
        data["cu_seqlens"] = pa.array(bounds, pa.list_(pa.int32()))
    if labels:
        data["labels"] = data["input_ids"]
    if named:  # one a row, as strings in a dictionary, where a row is a document
        data["dataset"] = pa.array(names) if packed else pa.array([own[0] for own in names]).dictionary_encode()
    pq.write_table(pa.table(data), folder / "part-0.parquet", row_group_size=7)
    return Table.open(folder)


def test_tallies_of_datasets(tmp_path):
    for packed in (True, False):
        table = pq.read_table(write(tmp_path / f"t{packed}", np.random.default_rng(3), 0, packed=packed).path)
        table = table.set_column(
            table.schema.get_field_index("dataset"),
            "dataset",
            id_lists(table["dataset"].combine_chunks(), "t", "dataset"),
        )
        found = tally_rows(table)
        assert datasets_of(found) == sorted(NAMES)
        for at, name in enumerate(NAMES):
            held = [[i for i in row if i % 3 == at] for row in table["input_ids"].to_pylist()]
            expected = {"rows": sum(map(bool, held)), "tokens": sum(map(len, held))}
            assert by_dataset([name], found)[name] == expected


@pytest.mark.parametrize("pack", ["cut", "best-fit"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_the_dataset_of_every_token(pack, multiple, packed, labels, tmp_path):
    """However samples are made of rows, in micro-batches of several, also by a stage that reads labels alone."""
    table, seen = write(tmp_path / "t", np.random.default_rng(5), 0, packed=packed, labels=labels), set()
    assert dataset_names(table) == sorted(NAMES)
    reader = SampleReader(table, 24, seed=1, pack=pack).with_datasets(sorted(NAMES))
    total = reader.samples_per_epoch
    for first in range(0, total, 4):
        batch = micro_batch(reader.for_stage(ids=False, labels=True), range(first, first + 4), total, multiple)
        ids = micro_batch(reader, range(first, first + 4), total, multiple).input_ids[0]
        trained = np.flatnonzero(batch.labels != IGNORE)
        names = [sorted(NAMES)[number] for number in batch.datasets.numbers[batch.datasets.documents[trained]]]
        assert names == [NAMES[ids[at] % 3] for at in trained]
        seen |= set(names)
        sums = summed(
            np.bincount(batch.datasets.documents[trained], minlength=len(batch.datasets.numbers)),
            *(batch.datasets.numbers, 3),
        )
        assert sums.tolist() == [names.count(name) for name in sorted(NAMES)]
    assert seen == set(NAMES)
    assert micro_batch(reader.for_stage(ids=True, labels=False), [0], total).datasets is None


def test_what_says_of_no_dataset_is_unnamed(tmp_path):
    """Nothing, an empty name, a list of another length; documents without tokens have no number."""
    lists = pa.array([["a", None, "c"], [""], None, ["b", "b", "b"]], pa.list_(pa.string()))
    bounds = pa.array([[0, 1, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2]], pa.list_(pa.int32()))
    ids = pa.array([[1, 2]] * 4, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids, "cu_seqlens": bounds, "dataset": lists}), tmp_path / "a.parquet")
    table = Table.open(tmp_path)
    names = dataset_names(table)
    assert names == ["a", "b", "c", "unnamed"]
    numbers = dataset_numbers(table.load(0, more=("dataset",)), names, "t")
    assert [names[number] for number in numbers] == ["a", "c", "unnamed", "unnamed", "unnamed", "b", "b"]
    assert dataset_names(write(tmp_path / "t", np.random.default_rng(0), 0, named=False)) == []


def test_a_manifest_that_counts_others_is_told(tmp_path):
    table = write(tmp_path / "t", np.random.default_rng(0), 0)
    reader = SampleReader(table, 24, seed=1).with_datasets(["books", "web"])
    with pytest.raises(UserError, match="row group 2 has the dataset 'code', which the table's manifest does not"):
        micro_batch(reader, range(reader.samples_per_epoch), reader.samples_per_epoch)


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["runs/web/train", "runs/books/train"], ["web", "books"]),
        (["a/web", "a/web/more"], ["a/web", "more"]),
        (["web", "web", "/lake/books"], ["web", "web", "/lake/books"]),
        (["web"], []),
    ],
)
def test_what_a_table_of_several_is_called(places, names):
    """By what tells it from the others; one that counts its own datasets keeps these."""
    tables = [SimpleNamespace(source=place, manifest=None, columns=()) for place in places]
    assert whole_datasets(tables) == (dict(zip(places, names, strict=True)) if names else {})
    counting = SimpleNamespace(source="counts", manifest=SimpleNamespace(datasets=["", "a"]), columns=("dataset",))
    assert counted_names(counting) == ["a", "unnamed"]
    assert "counts" not in whole_datasets([*tables, counting])


@pytest.mark.parametrize("packed", [True, False])
def test_documents_of_a_mixture_are_of_its_tables(packed, tmp_path):
    """One table says of which dataset its documents are, the other is one by itself."""
    tables = [
        write(tmp_path / name, np.random.default_rng(at), at * 90, packed, named=not at)
        for at, name in enumerate(("said", "whole"))
    ]
    names, whole = sorted((*NAMES, "whole")), {tables[1].source: "whole"}
    blend = Blend([SampleReader(table, 24, seed=1) for table in tables], [1, 1]).with_datasets(names, whole)
    batch = micro_batch(blend.for_stage(ids=False, labels=True), range(20), 20)
    ids, trained = micro_batch(blend, range(20), 20).input_ids[0], np.flatnonzero(batch.labels != IGNORE)
    told = [names[number] for number in batch.datasets.numbers[batch.datasets.documents[trained]]]
    assert told == ["whole" if ids[at] >= 90 else NAMES[ids[at] % 3] for at in trained]
    assert set(told) == set(names)


def test_texts_for_as_many_documents_as_there_are():
    lists = pa.array([["a", "b"], None, ["c"], [], ["d", "e", "f"], [None, "g"]], pa.list_(pa.string()))
    counts = np.array([2, 1, 3, 1, 2, 2])
    instead = pa.array(["t", "u", "v", "w", "x", "y"])
    expected = [["a", "b"], ["u"], ["c", "c", "c"], ["w"], ["d", "d"], ["y", "g"]]
    for begin in range(3):  # slices, too
        assert as_many(lists[begin:], counts[begin:], instead[begin:]).to_pylist() == expected[begin:]
    ids = pa.array([["1", "2"], ["3"]], pa.list_(pa.string()))
    assert of_rows(pa.array(["t", "u"]), ids).to_pylist() == [["t", "t"], ["u"]]
    assert id_lists(pa.array([True, None]), "t", "kept").to_pylist() == [["true"], [None]]
    with pytest.raises(UserError, match="t: column kept is struct"):
        id_lists(pa.array([{"a": 1}]), "t", "kept")
