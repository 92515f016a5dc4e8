"""Pairs of documents on their way to micro-batches: never apart, never cut, each with what a reference says of it."""

import json

import numpy as np
import pytest
from conftest import write_table
from pairs import random_pairs, write_pairs

from fft.data.batches import BatchPlan, step_batches
from fft.data.blend import Blend
from fft.data.manifest import FORMAT_VERSION, MANIFEST_NAME, read_manifest
from fft.data.pairs import REFERENCE_PREFIX, Reference, keep_reference, read_reference, reference_name, row_key
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table
from fft.errors import UserError

SEQ_LEN = 48


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(60, 100)


@pytest.fixture(scope="module")
def table(pairs, tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "table", pairs)


def reference_of(table: Table) -> Reference:
    """A number for every document: that of its row, and a half for what was rejected."""
    keys, values = [], []
    for number, group in enumerate(table.row_groups):
        first = sum(g.rows for g in table.row_groups[:number])
        for row in range(group.rows):
            keys += [int(row_key(number, row))] * 2
            values += [first + row, first + row + 0.5]
    return Reference(np.array(keys), np.array(values, np.float32))


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("replicas", [1, 2])
def test_an_epoch_has_every_pair_once_and_whole(pairs, table, multiple, replicas):
    opened = Table.open(table)
    reader = SampleReader(opened, SEQ_LEN, 3, pack="best-fit").with_pairs({opened.source: reference_of(opened)})
    seen = []
    steps = -(-reader.samples_per_epoch // (2 * 2 * replicas))
    for step in range(steps):
        for replica in range(replicas):
            plan = BatchPlan(replicas, replica, 2, 2, multiple)
            for batch in step_batches(reader, plan, step * plan.global_batch, reader.samples_per_epoch):
                ids, documents = batch.input_ids[0], batch.pairs.documents
                trained = batch.labels != IGNORE
                assert batch.trained == batch.pairs.count == len(batch.pairs.reference) // 2
                for pair in range(batch.pairs.count):
                    number = int(batch.pairs.reference[2 * pair])
                    assert batch.pairs.reference[2 * pair + 1] == number + 0.5
                    for document, (own, labels) in zip((2 * pair, 2 * pair + 1), pairs[number], strict=True):
                        held = np.flatnonzero(documents == document)[-len(own) :]  # what is blank stands before
                        assert ids[held].tolist() == own
                        predicted = batch.labels[held][trained[held]].tolist()
                        assert predicted == [label for label in labels[1:] if label != IGNORE]
                    seen.append(number)
    assert sorted(seen) == list(range(len(pairs)))


def test_a_reference_is_kept_beside_the_table(table):
    opened = Table.open(table)
    name = reference_name("model", opened.fingerprint)
    assert read_reference(opened.storage, name, opened.tokens) is None
    kept = Reference(reference_of(opened).keys, -reference_of(opened).values)
    keep_reference(opened.storage, name, kept)
    found = read_reference(opened.storage, name, opened.tokens)
    assert np.array_equal(found.values, kept.values)
    assert Table.open(table).fingerprint == opened.fingerprint  # it is no part of the table
    assert name.startswith(REFERENCE_PREFIX)
    assert name != reference_name("another", opened.fingerprint)
    (table / name).write_bytes(b"none")
    with pytest.raises(UserError, match=f"{name} holds no reference log-probabilities"):
        read_reference(opened.storage, name, opened.tokens)
    (table / name).unlink()


def test_a_table_that_cannot_be_written_beside_is_named(table, monkeypatch):
    opened = Table.open(table)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(type(opened.storage), "write", refuse)
    with pytest.raises(
        UserError, match=r"table/n cannot be written \(.*read-only.*\): reference log-probabilities are"
    ):
        keep_reference(opened.storage, "n", reference_of(opened))


def test_a_reference_of_other_rows_is_refused(table):
    opened = Table.open(table)
    known = reference_of(opened)
    shorter = Reference(known.keys[2:], known.values[2:])
    reader = SampleReader(opened, SEQ_LEN, 0, pack="best-fit").with_pairs({opened.source: shorter})
    with pytest.raises(UserError, match="its reference log-probabilities are of other documents: remove the files"):
        [*reader.samples(range(reader.samples_per_epoch))]
    order = np.random.default_rng(0).permutation(len(known.keys) // 2)
    mixed = Reference.of(known.keys.reshape(-1, 2)[order].ravel(), known.values.reshape(-1, 2)[order].ravel())
    assert np.array_equal(mixed.values, known.values)


def test_pairs_are_not_cut(table, pairs):
    opened = Table.open(table)
    with pytest.raises(UserError, match="has preferences, which --pack cut would cut: give --pack best-fit"):
        SampleReader(opened, SEQ_LEN, 0)
    longest = max(len(a[0]) + len(b[0]) for a, b in pairs)
    with pytest.raises(UserError, match=f"is a preference of {longest} tokens, more than --seq_len {longest - 1}"):
        SampleReader(opened, longest - 1, 0, pack="best-fit")


def test_half_a_pair_is_refused(table, tmp_path):
    rows = [np.arange(6, dtype=np.int32)] * 3
    folder = write_table(tmp_path / "odd", rows, files=1, cu_seqlens=[[0, 3, 6], [0, 2, 4, 6], [0, 6]])
    manifest = json.loads((table / MANIFEST_NAME).read_text())
    file = folder / "part-00000.parquet"
    manifest |= {"files": [{"path": file.name, "rows": 3, "tokens": 18, "bytes": file.stat().st_size}]}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    reader = SampleReader(Table.open(folder), 8, 0, pack="best-fit").with_pairs()
    with pytest.raises(UserError, match="a row of preferences holds half a pair"):
        [*reader.samples(range(3))]


def test_older_releases_are_told_to_upgrade(table):
    manifest = read_manifest(table)
    assert manifest.pairs
    assert json.loads(manifest.to_json())["format_version"] == FORMAT_VERSION == 4


def test_a_blend_of_pairs(pairs, tmp_path):
    tables = [Table.open(write_pairs(tmp_path / name, pairs[:20])) for name in ("a", "b")]
    blend = Blend([SampleReader(t, SEQ_LEN, 0, pack="best-fit").with_pairs() for t in tables], [1, 2])
    known = blend.with_pairs({t.source: reference_of(t) for t in tables})
    assert known.pairs
    (batch,) = step_batches(known, BatchPlan(1, 0, 1, 4), 0, known.samples_per_epoch)
    assert batch.pairs.reference.any()
    (batch,) = step_batches(blend.for_stage(ids=False, labels=True), BatchPlan(1, 0, 1, 4), 0, 100)
    assert not batch.pairs.reference.any()
