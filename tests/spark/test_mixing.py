"""Mixture weights and de-duplication of the shuffle job."""

import itertools
import sys
from collections import Counter

import pytest

from fft.errors import UserError
from spark.helpers import files_of, rows_of, write_foreign
from spark_jobs import shuffle_tables
from spark_jobs.cli import run_shuffle as main


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two tables of 400 one-row documents each; ninety contents stand in both, and ten twice in the first."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, first in (("web", 0), ("books", 300)):
        rows = [[i, i + 1, 7] for i in range(first, first + 400)]
        rows[390:] = rows[:10] if name == "web" else rows[390:]
        write_foreign(folder / name, rows, doc_ids=[[f"{name}-{i}"] for i in range(400)])
    return folder


def contents(table) -> Counter:
    return Counter(tuple(row["input_ids"]) for row in rows_of(table))


def names(table) -> Counter:
    return Counter(row["doc_ids"][0] for row in rows_of(table))


def test_weights_repeat_and_thin_out(spark, datasets, tmp_path):
    weights = {"web": 0.25, "books": 2.5}
    (manifest,) = shuffle_tables(datasets, tmp_path / "a", weights=weights, num_block=3).values()
    found = names(tmp_path / "a")
    web = {name: n for name, n in found.items() if name.startswith("web")}
    books = {name: n for name, n in found.items() if name.startswith("books")}
    assert set(web.values()) == {1}
    assert 70 <= len(web) <= 130
    assert len(books) == 400
    assert set(books.values()) == {2, 3}
    assert 160 <= sum(n == 3 for n in books.values()) <= 240
    counts = manifest.lineage["counts"]["datasets"]
    assert counts["web"]["rows"] == len(web)
    assert counts["books"]["rows"] == sum(books.values()) == manifest.rows - len(web)
    # Copies of a row lie apart, and the same weights choose the same documents under another number of blocks.
    order = [row["doc_ids"][0] for row in rows_of(tmp_path / "a")]
    assert sum(a == b for a, b in itertools.pairwise(order)) < 20
    shuffle_tables(datasets, tmp_path / "b", weights=weights, num_block=5)
    assert [row["doc_ids"][0] for row in rows_of(tmp_path / "b")] == order


def test_weights_by_tokens_are_shares_of_the_mixture(spark, datasets, tmp_path, capsys):
    write_foreign(tmp_path / "long", [[1] * 30] * 40, doc_ids=[[f"long-{i}"] for i in range(40)])
    shares = {"web": 1, "books": 0, "long": 3}
    inputs = [datasets / "web", datasets / "books", tmp_path / "long"]
    options = {"weights": shares, "weight_by": "tokens", "num_block": 3}
    (manifest,) = shuffle_tables(inputs, tmp_path / "a", **options).values()
    counts = manifest.lineage["counts"]["datasets"]
    assert manifest.tokens == pytest.approx(3 * 1200, rel=0.05)  # as many as the tables together
    assert counts["long"]["tokens"] / manifest.tokens == pytest.approx(0.75, abs=0.03)
    assert counts["books"]["tokens"] == 0
    told = f"long {counts['long']['rows']} {counts['long']['rows'] / manifest.rows:.1%}"
    assert told in " ".join(capsys.readouterr().err.split()).replace(",", "")
    with pytest.raises(UserError, match='`weights` has no books, long: with `weight_by="tokens"` each table needs a'):
        shuffle_tables(inputs, tmp_path / "b", weights={"web": 1.0}, weight_by="tokens")


def test_weight_one_changes_nothing(spark, datasets, tmp_path):
    shuffle_tables(datasets, tmp_path / "a", num_block=3)
    shuffle_tables(datasets, tmp_path / "b", num_block=3, weights={"web": 1.0, "books": 1})
    assert [f.read_bytes() for f in files_of(tmp_path / "a")] == [f.read_bytes() for f in files_of(tmp_path / "b")]


def test_dedup_keeps_every_content_once(spark, datasets, tmp_path):
    (manifest,) = shuffle_tables(datasets, tmp_path / "a", dedup=True, num_block=3).values()
    found = contents(tmp_path / "a")
    shuffle_tables(datasets, tmp_path / "all", num_block=3)
    assert set(found) == set(contents(tmp_path / "all"))
    assert set(found.values()) == {1}
    counts = manifest.lineage["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["duplicates"]) == (800, 700, 100)


def test_dedup_lets_no_held_out_content_into_training(spark, datasets, tmp_path):
    manifests = shuffle_tables(datasets, tmp_path / "a", dedup=True, holdout=0.3, weights={"books": 3}, num_block=3)
    train, validation = contents(tmp_path / "a/train"), contents(tmp_path / "a/validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 700
    assert set(validation.values()) == {1}
    assert set(train.values()) == {1, 3}
    assert manifests["validation"].rows == len(validation)
    # Without it, equal contents under different ids lie on both sides.
    shuffle_tables(datasets, tmp_path / "b", holdout=0.3)
    assert set(contents(tmp_path / "b/train")) & set(contents(tmp_path / "b/validation"))


def test_the_same_on_sail(spark, launch, datasets, tmp_path):
    flags = ["--weights", "books=2.5", "--dedup", "--holdout", "0.2", "--num_block", "3"]
    command = [sys.executable, "spark_jobs/shuffle.py", "-i", datasets, "-o", tmp_path / "sail", *flags]
    done = launch(*command, env={"FFT_ENGINE": "sail"})
    assert done.returncode == 0, done.stderr
    main(["-i", str(datasets), "-o", str(tmp_path / "jvm"), *flags])
    for split in ("train", "validation"):
        ours, theirs = (files_of(tmp_path / engine / split) for engine in ("sail", "jvm"))
        assert [f.read_bytes() for f in ours] == [f.read_bytes() for f in theirs]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"wbe": 1.0}, "`weights` names wbe, but the tables are books, web"),
        ({"web": -1.0}, "`weights` web=-1.0: a weight must be 0 or more"),
        ({"web": 0.0, "books": 0.0}, "are all 0"),
    ],
)
def test_weights_that_are_none(spark, datasets, tmp_path, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        shuffle_tables(datasets, tmp_path / "a", weights=weights)


def test_weights_on_the_command_line(datasets, tmp_path):
    with pytest.raises(UserError, match="--weights: 'web:2' is not NAME=NUMBER"):
        main(["-i", str(datasets), "-o", str(tmp_path / "a"), "--weights", "web:2"])
