"""The shuffle job: one order by seed, nothing lost, nothing leaked."""

import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.commits import begin_writing
from fft.data.manifest import WRITING_NAME, read_manifest
from fft.data.part_files import PartFolder
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from spark.helpers import hashes_of, rows_of, write_foreign
from spark_jobs import shuffle_tables
from spark_jobs.cli import run_shuffle as main
from spark_jobs.placing import RowChoice
from spark_jobs.shuffle_job import WriteRows

#: How the shuffle orders twelve rows of one token each with seed 0.
GOLDEN = [4, 8, 1, 5, 9, 0, 2, 3, 7, 11, 10, 6]


def names_of(rows):
    return [row["doc_ids"][0] for row in rows]


def by_name(row):
    return (row["doc_ids"], row["input_ids"])


def of_dataset(rows, name):
    """Rows as they are in a shuffle of a table of that name."""
    return sorted([{**row, "dataset": [name]} for row in rows], key=by_name)


def test_rows_are_the_same_in_another_order_that_the_seed_decides(spark, tokens, tmp_path):
    before = rows_of(tokens)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shuffle_tables(tokens, tmp_path / name, seed=seed, num_block=3)
        assert sorted(rows_of(tmp_path / name), key=by_name) == of_dataset(before, "tokens")
    assert hashes_of(tmp_path / "a") == hashes_of(tmp_path / "b")
    assert len(hashes_of(tmp_path / "a")) == 3
    a, c = names_of(rows_of(tmp_path / "a")), names_of(rows_of(tmp_path / "c"))
    assert a != c
    assert a != sorted(a)


def test_the_order_does_not_depend_on_how_the_input_lies(spark, tokens, tmp_path):
    """The same rows in one file, reversed, give the same table."""
    rows = rows_of(tokens)[::-1]
    names = pa.array([row["doc_ids"] for row in rows], pa.list_(pa.string()))
    write_foreign(tmp_path / "tokens", [row["input_ids"] for row in rows], doc_ids=names)
    shuffle_tables(tokens, tmp_path / "a", num_block=3)
    shuffle_tables(tmp_path / "tokens", tmp_path / "b", num_block=3)
    assert hashes_of(tmp_path / "a") == hashes_of(tmp_path / "b")


def test_the_global_order_is_the_same_whatever_the_number_of_blocks(spark, tokens, tmp_path):
    for blocks in (1, 5):
        shuffle_tables(tokens, tmp_path / str(blocks), num_block=blocks)
    assert rows_of(tmp_path / "1") == rows_of(tmp_path / "5")


def test_held_out_documents_are_in_no_training_row(shuffled, tokens):
    train, validation = rows_of(shuffled / "train"), rows_of(shuffled / "validation")
    assert validation
    assert not set(names_of(train)) & set(names_of(validation))
    assert sorted(train + validation, key=by_name) == of_dataset(rows_of(tokens), "tokens")


def test_manifests_of_both_sides(shuffled, tokens):
    train, validation = read_manifest(shuffled / "train"), read_manifest(shuffled / "validation")
    whole = read_manifest(tokens)
    assert train.rows + validation.rows == whole.rows
    assert train.tokens + validation.tokens == whole.tokens
    for manifest in (train, validation):
        counts = manifest.lineage["counts"]
        assert manifest.tokenizer == whole.tokenizer
        assert manifest.seed == 0
        assert counts["rows_in"] == counts["rows_out"] == whole.rows
        assert manifest.trained_tokens == manifest.tokens - manifest.rows
        assert counts["datasets"] == {"tokens": {"rows": manifest.rows, "tokens": manifest.tokens}}
        parameters = {"seed": 0, "num_block": 4, "holdout": 0.1, "weights": {"tokens": 1.0}, "dedup": False}
        assert manifest.lineage["parameters"] == parameters | {"weight_by": "documents"}
        assert manifest.lineage["timing"]["tokens_per_second"] > 0


def test_equal_ids_and_equal_rows_are_all_kept_and_held_out_together(spark, tmp_path):
    rows = [[i, i + 1] for i in range(40)] * 2
    names = pa.array([[f"d{i % 4}"] for i in range(80)], pa.list_(pa.string()))
    write_foreign(tmp_path / "in", rows, doc_ids=names)
    shuffle_tables(tmp_path / "in", tmp_path / "out", holdout=0.4, num_block=2)
    train, validation = rows_of(tmp_path / "out/train"), rows_of(tmp_path / "out/validation")
    assert sorted(r["input_ids"] for r in train + validation) == sorted(rows)
    assert not set(names_of(train)) & set(names_of(validation))


@pytest.mark.parametrize("cuts", [[], [1], [2], [3], [1, 2], [2, 4], [1, 2, 3, 4, 5, 6, 7]])
def test_duplicates_are_found_wherever_batches_end(cuts, tmp_path):
    """Neighbours that are equal may lie in two batches of Arrow, or in three."""
    ids = [[1], [2, 3], [2, 3], [2, 3], [4], [4], [], [5]]
    columns = {
        "part": pa.array([0] * 7 + [1], pa.int32()),
        "sort_key": pa.array([1, 2, 2, 2, 3, 3, 4, 5], pa.int64()),
        "kept": pa.array([True, False, True, True, True, True, True, True]),
        "dataset": pa.array(["t"] * 8),
        "doc_ids": pa.array([[f"d{i}"] for i in range(8)], pa.list_(pa.string())),
        "input_ids": pa.array([np.array(row, np.int32).tobytes() for row in ids], pa.large_binary()),
    }
    whole = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    bounds = [0, *cuts, len(ids)]
    batches = [whole.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    target = PartFolder(tmp_path, WorkerNotes(str(tmp_path)))
    done = pa.Table.from_batches(list(WriteRows(target, RowChoice(("input_ids",)))(iter(batches)))).to_pylist()
    rows = [row for part in done for row in pq.read_table(tmp_path / part["name"]).to_pylist()]
    assert names_of(rows) == ["d0", "d4", "d7"]  # d1 is held out, and takes d2 and d3 with it
    tallies = [dict(part["tallies"]) for part in done]
    assert [(t["rows_out"], t["duplicates"], t["empty"]) for t in tallies] == [(2, 3, 1), (1, 0, 0)]


def test_the_order_never_changes(spark, tmp_path):
    """Seed, table, ids and content each change the order; the same of all of them keeps it, in every release."""

    def order(name, seed, ids, rows):
        folder, out = tmp_path / f"in{seed}" / name, tmp_path / f"out{seed}" / name
        write_foreign(folder, rows, doc_ids=pa.array([[i] for i in ids], pa.list_(pa.string())))
        shuffle_tables(folder, out, seed=seed, num_block=2)
        return [row["input_ids"][0] for row in rows_of(out)]

    rows, ids = [[i] for i in range(12)], [str(i) for i in range(12)]
    found = order("a", 0, ids, rows)
    assert found == GOLDEN
    others = [
        order("a", 1, ids, rows),
        order("b", 0, ids, rows),
        order("c", 0, ids[::-1], rows),
        [i - 12 for i in order("d", 0, ids, [[i + 12] for i in range(12)])],
    ]
    assert all(sorted(other) == sorted(found) for other in others)
    assert len({tuple(other) for other in [found, *others]}) == 5


def test_a_folder_of_tables_with_different_columns(spark, tmp_path, capsys):
    folder = tmp_path / "all"
    write_foreign(folder / "plain", [[1, 2], [3], []])
    write_foreign(
        folder / "packed",
        [[4, 5, 6]],
        labels=pa.array([[-100, 5, 6]], pa.list_(pa.int32())),
        cu_seqlens=pa.array([[0, 1, 3]], pa.list_(pa.int32())),
        doc_ids=pa.array([["x", "y"]], pa.list_(pa.string())),
    )
    (manifest,) = shuffle_tables(folder, tmp_path / "out").values()
    rows = {tuple(row["input_ids"]): row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {(1, 2), (3,), (4, 5, 6)}
    # What the absence of a column means, written out.
    assert rows[1, 2]["labels"] == [1, 2]
    assert rows[1, 2]["cu_seqlens"] == [0, 2]
    assert rows[4, 5, 6]["labels"] == [-100, 5, 6]
    assert rows[4, 5, 6]["doc_ids"] == ["x", "y"]
    assert manifest.lineage["counts"]["datasets"] == {
        "packed": {"rows": 1, "tokens": 3},
        "plain": {"rows": 2, "tokens": 3},
    }
    assert manifest.lineage["counts"]["empty"] == 1
    assert "1 rows without tokens were left out" in capsys.readouterr().err


def test_datasets_of_the_same_name_are_told_apart(spark, tmp_path):
    for parent in ("a", "b"):
        write_foreign(tmp_path / parent / "t", [[1], [2]])
    (manifest,) = shuffle_tables([tmp_path / "a/t", tmp_path / "b/t"], tmp_path / "out").values()
    assert set(manifest.lineage["counts"]["datasets"]) == {"a/t", "b/t"}
    assert manifest.rows == 4


def test_an_unfinished_output_is_cleared_and_made_again(spark, tokens, tmp_path):
    out = tmp_path / "out"
    begin_writing(out / "train", {})
    (out / "train/part-old.parquet").write_text("half")
    shuffle_tables(tokens, out, holdout=0.1)
    assert not list(out.rglob("part-old*"))
    assert not list(out.rglob(WRITING_NAME))
    assert read_manifest(out / "train").rows == len(rows_of(out / "train"))


def test_a_finished_output_is_replaced_only_with_overwrite(spark, tokens, tmp_path):
    arguments = ["-i", str(tokens), "-o", str(tmp_path / "out")]
    main([*arguments, "--holdout", "0.2"])
    with pytest.raises(UserError, match="exists: give --overwrite"):
        main(arguments)
    main([*arguments, "--overwrite"])
    assert not (tmp_path / "out/train").exists()
    assert read_manifest(tmp_path / "out").rows == len(rows_of(tokens))


def test_overwrite_never_deletes_other_peoples_files(spark, tokens, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex, which is no part of a table"):
        shuffle_tables(tokens, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_what_is_no_input_is_refused_in_one_sentence(spark, tokens, tmp_path):
    def fails(match, *inputs, **options):
        with pytest.raises(UserError, match=match):
            shuffle_tables(list(inputs), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    fails("does not exist", tmp_path / "missing")
    (tmp_path / "hollow").mkdir()
    fails("holds no token table", tmp_path / "hollow")
    other = write_foreign(tmp_path / "other", [[1]])
    (other / "part-0.parquet").unlink()
    pa.parquet.write_table(pa.table({"text": ["a"]}), other / "part-0.parquet")
    fails("has no column input_ids", other)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tokens, unfinished)
    begin_writing(unfinished, {})
    fails("is unfinished", unfinished)
    fails("leaves no row for validation", tokens, holdout=1e-9)
    fails("leaves no row for train", tokens, holdout=1 - 1e-9)
    fails("more than once", tokens, tokens)
    packed = write_foreign(tmp_path / "p", [[1, 2]], cu_seqlens=pa.array([[0, 2]], pa.list_(pa.int32())))
    fails("hold out before", packed, holdout=0.1)
    nulls = write_foreign(tmp_path / "nulls", [[1, None]])
    fails("holds null", nulls)
