"""The repartition job: equal partitions, packed rows, no token lost."""

import itertools
import os
import shutil
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.manifest import MANIFEST_NAME, read_manifest
from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import files_of, hashes_of, rows_of, write_foreign
from spark_jobs import repartition_table
from spark_jobs.cli import run_repartition as main


def documents_of(rows):
    """Pieces of ids by document, as a sorted list of tuples."""
    found = defaultdict(list)
    for row in rows:
        bounds = row["cu_seqlens"]
        assert bounds[0] == 0
        assert bounds[-1] == len(row["input_ids"])
        for name, a, b in zip(row["doc_ids"], bounds[:-1], bounds[1:], strict=True):
            found[name].append(row["input_ids"][a:b])
    return {name: sorted(pieces) for name, pieces in found.items()}


@pytest.fixture(scope="module")
def packed(spark, shuffled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    repartition_table(shuffled, folder, max_len=256, num_partition=3)
    return folder


def test_best_fit_keeps_every_document_and_cuts_only_long_ones(packed, shuffled):
    for split in ("train", "validation"):
        before = {row["doc_ids"][0]: row["input_ids"] for row in rows_of(shuffled / split)}
        after = documents_of(rows_of(packed / split))
        assert set(after) == set(before)
        for name, ids in before.items():
            assert after[name] == sorted(ids[at : at + 256] for at in range(0, len(ids), 256))


def test_partitions_hold_equal_token_counts_and_little_is_unused(packed):
    manifest = read_manifest(packed / "train")
    tokens = [f.tokens for f in manifest.files]
    assert len(tokens) == 3
    assert max(tokens) / min(tokens) <= 1.02
    assert manifest.lineage["counts"]["unused_share"] < 0.005
    assert manifest.seq_len == 256
    assert manifest.tokenizer is not None
    assert manifest.lineage["parameters"] == {"max_len": 256, "pack": "best-fit", "num_partition": 3, "seed": 0}
    assert manifest.tokens == sum(len(row["input_ids"]) for row in rows_of(packed / "train"))


def test_the_trainer_reads_it_in_small_row_groups(packed):
    table = Table.open(packed / "train")
    rows = table.read(0, vocab_size=table.manifest.tokenizer.vocab_size)
    assert rows.ends is not None
    for file in files_of(packed / "train"):
        metadata = pq.read_metadata(file)
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert set(sizes[:-1]) <= {1024}


def test_facts_for_a_human_reader(packed):
    text = (packed / "train/_data.info").read_text()
    assert "unused positions" in text
    assert "best-fit" in text


def test_the_seed_decides_and_the_files_of_the_input_do_not(spark, shuffled, packed, tmp_path):
    rows = rows_of(shuffled / "train")[::-1]
    names = pa.array([row["doc_ids"] for row in rows], pa.list_(pa.string()))
    datasets = [row["dataset"] for row in rows]
    write_foreign(tmp_path / "in", [row["input_ids"] for row in rows], doc_ids=names, dataset=datasets)
    repartition_table(tmp_path / "in", tmp_path / "same", max_len=256, num_partition=3)
    assert hashes_of(tmp_path / "same") == hashes_of(packed / "train")
    repartition_table(tmp_path / "in", tmp_path / "other", max_len=256, num_partition=3, seed=1)
    assert hashes_of(tmp_path / "other") != hashes_of(packed / "train")


def test_concat_fills_all_rows_of_a_partition_but_one(spark, shuffled, tmp_path):
    repartition_table(shuffled / "train", tmp_path / "out", max_len=256, pack="concat", num_partition=2)
    for file in files_of(tmp_path / "out"):
        assert sum(len(row["input_ids"]) < 256 for row in pq.read_table(file).to_pylist()) <= 1
    before, after = rows_of(shuffled / "train"), rows_of(tmp_path / "out")
    joined = {name: sorted(i for piece in pieces for i in piece) for name, pieces in documents_of(after).items()}
    assert joined == {row["doc_ids"][0]: sorted(row["input_ids"]) for row in before}


def test_packed_rows_can_be_packed_again_or_left_as_they_are(spark, packed, tmp_path):
    before = rows_of(packed / "validation")
    repartition_table(packed / "validation", tmp_path / "again", max_len=256, num_partition=1, seed=5)
    assert documents_of(rows_of(tmp_path / "again")) == documents_of(before)
    repartition_table(packed / "validation", tmp_path / "left", max_len=256, pack="none", num_partition=2)
    assert sorted(map(repr, rows_of(tmp_path / "left"))) == sorted(map(repr, before))


def test_labels_go_with_their_tokens(spark, tmp_path):
    rows = [list(range(n, 2 * n)) for n in range(1, 60)]
    labels = [[-100 if i % 2 else i for i in row] for row in rows]
    write_foreign(tmp_path / "in", rows, labels=pa.array(labels, pa.list_(pa.int32())))
    repartition_table(tmp_path / "in", tmp_path / "out", max_len=32, num_partition=2)
    out = rows_of(tmp_path / "out")
    assert all(row["labels"] == [-100 if i % 2 else i for i in row["input_ids"]] for row in out)
    assert sorted(i for row in out for i in row["input_ids"]) == sorted(i for row in rows for i in row)
    pieces = [row["labels"][a + 1 : b] for row in out for a, b in itertools.pairwise(row["cu_seqlens"])]
    manifest = read_manifest(tmp_path / "out")  # of a document's first token nothing is learned, whatever its label
    assert manifest.trained_tokens == sum(label != -100 for piece in pieces for label in piece)
    assert manifest.trained_tokens + manifest.untrained_tokens == manifest.tokens


def test_what_is_no_input_is_refused_in_one_sentence(spark, tmp_path, packed):
    def fails(match, path, *args):
        with pytest.raises(UserError, match=match):
            main(["-i", str(path), "-o", str(tmp_path / "out"), "--max_len", "8", *args])
        assert not (tmp_path / "out").exists()

    fails("does not exist", tmp_path / "missing")
    for name in ("a", "b"):
        write_foreign(tmp_path / "many" / name, [[1]])
    fails("holds the tables a, b", tmp_path / "many")
    bounds = pa.array([[0, 5]], pa.list_(pa.int32()))
    fails("cu_seqlens must rise", write_foreign(tmp_path / "wrong", [[1, 2]], cu_seqlens=bounds))
    with pytest.raises(UserError, match="exists: give --overwrite"):
        main(["-i", str(tmp_path / "many/a"), "-o", str(packed), "--max_len", "8"])
    with pytest.raises(UserError, match="--max_len: 0 is not a positive number"):
        main(["-i", "x", "-o", "y", "--max_len", "0"])


def test_in_place(shuffled, tmp_path):
    table = tmp_path / "t"
    shutil.copytree(shuffled, table)
    with pytest.raises(UserError, match=r"without `output` .*t itself is replaced: allow that with `overwrite=True`"):
        repartition_table(table, max_len=128)
    (table / "train" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt, which is no part of a table"):
        repartition_table(table, max_len=128, overwrite=True)
    (table / "train" / "notes.txt").unlink()
    repartition_table(table, max_len=128, num_partition=3, overwrite=True)
    repartition_table(shuffled, tmp_path / "other", max_len=128, num_partition=3)
    for split in ("train", "validation"):
        assert hashes_of(table / split) == hashes_of(tmp_path / "other" / split)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "t"]


@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_replacement_leaves_a_table(done, shuffled, tmp_path, monkeypatch):
    """Killed before or after the manifest has its name, with no chance to tidy up: the old table or the new one."""
    table = tmp_path / "t"
    shutil.copytree(shuffled / "train", table)
    replace = os.replace

    def dies_at_the_manifest(source, target):
        if str(target).endswith(MANIFEST_NAME):
            if done:
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    def forgets(*_):
        return None

    with monkeypatch.context() as patch:
        patch.setattr("fft.files.os.replace", dies_at_the_manifest)
        patch.setattr("spark_jobs.token_table.output.Output._abandon", forgets)
        with pytest.raises(KeyboardInterrupt):
            repartition_table(table, max_len=128, num_partition=2, overwrite=True)
    assert len(files_of(table)) > 2  # both tables' files; one of them counts
    assert Table.open(table).manifest.seq_len == (128 if done else None)
    found = {group.path for group in Table.open(table).row_groups}
    assert len(found) == (2 if done else len(files_of(shuffled / "train")))
    repartition_table(table, max_len=128, num_partition=2, overwrite=True)
    repartition_table(shuffled / "train", tmp_path / "once", max_len=128, num_partition=2)
    assert Table.open(table).tokens == Table.open(tmp_path / "once").tokens
    if not done:
        assert Table.open(table).fingerprint == Table.open(tmp_path / "once").fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "t"]
    assert (
        len(list(table.iterdir())) == 4
    )  # two parts, manifest, information: nothing of the first try or the old table
