"""tokenize, shuffle and pack by ``df.transform``: the rows of the jobs, on Spark, on Sail, and on streams."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import functions as F
from transformers import AutoTokenizer

from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import rows_of
from spark_jobs import pack, repartition_table, shuffle, shuffle_tables, tokenize, tokenize_table

ROOT = Path(__file__).resolve().parents[2]

#: The whole chain on Sail; what the test has to say stands in its place.
ON_SAIL = """
import sys
from pyspark.sql import functions as F
from spark_jobs import get_session, pack, shuffle, tokenize
corpus, tokenizer, out = sys.argv[1:]
rows = get_session("transforms").read.json(corpus).transform(tokenize(tokenizer)).withColumn("dataset", F.lit("tokens"))
rows.drop("dataset").write.parquet(f"{out}/tokens")
train = rows.transform(shuffle(holdout=0.1, num_block=4))
train.write.parquet(f"{out}/train")
train.transform(pack(256, num_partition=3)).write.parquet(f"{out}/packed")
"""


def as_set(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def written(df, folder):
    """The rows of a DataFrame as Spark's own writer leaves them, in the order of its files."""
    df.write.parquet(str(folder))
    return rows_of(folder)


@pytest.fixture(scope="module")
def packed(spark, shuffled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    repartition_table(shuffled, folder, max_len=256, num_partition=3)
    return folder


def named(df):
    return df.withColumn("dataset", F.lit("tokens"))


def test_every_stage_has_the_rows_of_its_job_in_its_order(spark, corpus, tokenizer, tokens, shuffled, packed, tmp_path):
    rows = spark.read.json(str(corpus)).transform(tokenize(tokenizer))
    assert as_set(written(rows, tmp_path / "tokens")) == as_set(rows_of(tokens))
    order = rows.repartition(5).transform(named)
    train = order.transform(shuffle(holdout=0.1, num_block=4))
    assert written(train, tmp_path / "train") == rows_of(shuffled / "train")
    held = order.transform(shuffle(holdout=0.1, num_block=1, split="validation"))
    assert written(held, tmp_path / "held") == rows_of(shuffled / "validation")
    assert written(train.transform(pack(256, num_partition=3)), tmp_path / "packed") == rows_of(packed / "train")
    assert Table.open(tmp_path / "packed").tokens == Table.open(packed / "train").tokens


def test_columns_are_kept_as_the_jobs_keep_them(spark, documents, tokenizer, tmp_path):
    records = [one | {"url": f"https://a/{at}", "stars": at} for at, one in enumerate(documents)]
    (corpus := tmp_path / "corpus.json").write_text("".join(json.dumps(one) + "\n" for one in records))
    keep = ["url", "stars"]
    tokenize_table(corpus, tmp_path / "tokens", tokenizer, keep=keep)
    shuffle_tables({"tokens": tmp_path / "tokens"}, tmp_path / "shuffled", keep=keep, num_block=2)
    repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=256, num_partition=3)
    frame = spark.read.schema("id string, text string, url string, stars int").json(str(corpus))
    rows = frame.transform(tokenize(tokenizer, keep=keep))
    assert as_set(written(rows, tmp_path / "rows")) == as_set(rows_of(tmp_path / "tokens"))
    mixed = named(rows).transform(shuffle(num_block=2, keep=keep))
    assert written(mixed, tmp_path / "mixed") == rows_of(tmp_path / "shuffled")
    packed = mixed.transform(pack(256, num_partition=3, keep=keep))
    assert written(packed, tmp_path / "parts") == rows_of(tmp_path / "packed")


def test_columns_are_kept_on_a_stream_beside_malformed_records_and_by_any_packing(spark, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    records = [{"id": f"n{at}", "text": f"number {at} " * at, "url": f"u{at}", "stars": at} for at in range(1, 9)]
    (tmp_path / "in" / "a.json").write_text("".join(json.dumps(one) + "\n" for one in records))
    schema, keep = "id string, text string, url string, stars int", ["url", "stars"]
    frame = spark.read.schema(schema).json(str(tmp_path / "in")).coalesce(1)
    rows = frame.transform(tokenize(tokenizer, keep=keep))
    kept = {row["doc_ids"][0]: (row["url"], row["stars"]) for row in rows.collect()}
    assert kept == {one["id"]: ([one["url"]], [str(one["stars"])]) for one in records}
    packed = rows.transform(pack(64, keep=["url"])).collect()
    assert [row["url"] for row in packed] == [[f"u{name[1:]}" for name in row["doc_ids"]] for row in packed]
    assert "stars" not in packed[0]
    source = spark.readStream.schema(schema).json(str(tmp_path / "in"))
    query = source.transform(tokenize(tokenizer, keep=keep)).writeStream.format("parquet")
    query = query.option("checkpointLocation", str(tmp_path / "state")).trigger(availableNow=True)
    query.start(str(tmp_path / "streamed")).awaitTermination()
    assert as_set(rows_of(tmp_path / "streamed")) == as_set([row.asDict() for row in rows.collect()])

    bad = frame.limit(2).withColumn("text", F.when(F.col("stars") == 1, F.col("text")))
    told = bad.transform(tokenize(tokenizer, keep=["url"], on_error="quarantine"))
    assert told.columns == ["input_ids", "doc_ids", "url", "error", "record"]
    assert {row["error"] is None: row["url"] for row in told.collect()} == {True: ["u1"], False: None}
    for wrong, said in ((["nope"], "the DataFrame has not"), (["doc_ids"], "which is always kept")):
        for transform in (shuffle(keep=wrong), pack(64, keep=wrong), pack(64, num_partition=2, keep=wrong)):
            with pytest.raises(UserError, match=said):
                rows.transform(transform)
    with pytest.raises(UserError, match="`keep` names error"):
        tokenize(tokenizer, keep=["error"], on_error="quarantine")
    with pytest.raises(UserError, match="no column nope to `keep`"):
        frame.transform(tokenize(tokenizer, keep=["nope"]))


def test_the_order_does_not_depend_on_the_number_of_blocks(spark, tokens, tmp_path):
    rows = spark.read.parquet(str(tokens))
    three = written(rows.transform(shuffle(seed=5, num_block=3)), tmp_path / "three")
    assert three == written(rows.repartition(7).transform(shuffle(seed=5)), tmp_path / "four")
    assert as_set(three) == as_set(rows_of(tokens))
    assert three != written(rows.transform(shuffle(seed=6)), tmp_path / "other")


def test_a_mixture_without_duplicates_is_that_of_the_job(spark, tokens, documents, tokenizer, tmp_path):
    web, books = documents[:60], documents[40:]
    for name, some in (("web", web), ("books", books)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
        tokenize_table(tmp_path / f"{name}.jsonl", tmp_path / "in" / name, tokenizer)
    flags = {"seed": 3, "weights": {"web": 0.5, "books": 2}, "holdout": 0.2, "dedup": True}
    shuffle_tables(tmp_path / "in", tmp_path / "job", num_block=2, **flags)
    parts = [
        spark.read.parquet(str(tmp_path / "in" / name)).withColumn("dataset", F.lit(name)) for name in ("web", "books")
    ]
    ours = parts[0].union(parts[1]).transform(shuffle(num_block=2, **flags))
    assert written(ours, tmp_path / "ours") == rows_of(tmp_path / "job" / "train")


def test_ids_are_those_of_transformers(spark, documents, tokenizer):
    frame = spark.createDataFrame([(one["text"], i) for i, one in enumerate(documents)], "content string, number int")
    rows = frame.transform(tokenize(tokenizer, text_key="content", id_key="number", eos="never")).collect()
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    assert {row["doc_ids"][0]: row["input_ids"] for row in rows} == {
        str(i): theirs(one["text"])["input_ids"] for i, one in enumerate(documents)
    }


@pytest.mark.thorough
def test_on_sail_all_stages_have_the_rows_of_the_jobs(
    launch, spark, corpus, tokenizer, tokens, shuffled, packed, tmp_path
):
    done = launch(sys.executable, "-c", ON_SAIL, corpus, tokenizer, tmp_path, env={"FFT_ENGINE": "sail"})
    assert done.returncode == 0, done.stderr
    for name, job in (("tokens", tokens), ("train", shuffled / "train"), ("packed", packed / "train")):
        rows = [row for file in sorted((tmp_path / name).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        assert as_set(rows) == as_set(rows_of(job))


def test_a_stream_gets_the_same_rows(spark, documents, tokenizer, tokens, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        lines = "".join(json.dumps(one) + "\n" for one in documents[i::3])
        (tmp_path / "in" / f"{i}.json").write_text(lines)
    source = spark.readStream.schema("id string, text string").option("maxFilesPerTrigger", 1)
    rows = source.json(str(tmp_path / "in")).transform(tokenize(tokenizer))
    for name, df in (("rows", rows), ("packed", rows.transform(pack(512)))):
        query = df.writeStream.format("parquet").option("checkpointLocation", str(tmp_path / f"{name}-state"))
        query.trigger(availableNow=True).start(str(tmp_path / name)).awaitTermination()
    assert as_set(rows_of(tmp_path / "rows")) == as_set(rows_of(tokens))
    packed = rows_of(tmp_path / "packed")
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(row["input_ids"]) for row in rows_of(tokens))
    with pytest.raises(UserError, match="shuffle needs all rows at once, and a stream has no end"):
        rows.transform(shuffle())
    with pytest.raises(UserError, match="pack, with `num_partition`, needs all rows at once"):
        rows.transform(pack(512, num_partition=2))


@pytest.mark.parametrize("method", ["best-fit", "concat", "none"])
def test_packing_in_place_keeps_every_document(spark, tokens, method, tmp_path):
    rows = spark.read.parquet(str(tokens)).transform(shuffle(num_block=2))
    ours = written(rows.transform(pack(300, method=method)), tmp_path / "packed")
    assert Table.open(tmp_path / "packed").rows == len(ours)
    assert max(len(row["input_ids"]) for row in ours) <= 300
    spans = {}
    for row in ours:
        bounds = row["cu_seqlens"]
        for name, begin, end in zip(row["doc_ids"], bounds, bounds[1:], strict=False):
            spans.setdefault(name, []).append(row["input_ids"][begin:end])
    whole = {row["doc_ids"][0]: row["input_ids"] for row in rows_of(tokens)}
    assert {name: sorted(chain(*parts)) for name, parts in spans.items()} == {n: sorted(i) for n, i in whole.items()}
    again = written(rows.transform(pack(300, method=method)), tmp_path / "again")
    assert again == ours


def test_malformed_records_stay_with_their_reason_or_end_the_query(spark, tokenizer):
    frame = spark.createDataFrame([("a", "fine"), ("b", None), ("c", "too")], "id string, text string")
    rows = frame.transform(tokenize(tokenizer, on_error="quarantine"))
    assert rows.columns == ["input_ids", "doc_ids", "error", "record"]
    bad = rows.where("error is not null").collect()
    assert [(row["input_ids"], row["error"], row["record"]) for row in bad] == [(None, "text is null", None)]
    assert sorted(row["doc_ids"][0] for row in rows.where("error is null").collect()) == ["a", "c"]
    for then in (shuffle(), pack(8)):
        with pytest.raises(UserError, match="columns error and record of malformed records"):
            rows.transform(then)
    with pytest.raises(PySparkException, match="UserError: DataFrame, id b: text is null"):
        frame.transform(tokenize(tokenizer)).collect()


def test_what_is_no_column_or_parameter_is_one_sentence(spark, tokenizer):
    frame = spark.createDataFrame([("a",)], "body string")
    for wrong, sentence in (
        (tokenize(tokenizer), "has no column text"),
        (shuffle(), "has no column input_ids"),
        (pack(8), "has no column input_ids"),
    ):
        with pytest.raises(UserError, match=sentence):
            frame.transform(wrong)
    images = spark.createDataFrame([([1], [b"x"])], "input_ids array<int>, images array<binary>")
    with pytest.raises(UserError, match="rows with images are packed by"):
        images.transform(pack(8))
    for make, sentence in (
        (lambda: tokenize(tokenizer, task="talk"), "`task` is 'talk'"),
        (lambda: tokenize(tokenizer, task="chat", text_key="body"), "`text_key` is for"),
        (lambda: shuffle(split="test"), "`split` is 'test'"),
        (lambda: pack(0), "`max_len` is 0"),
        (lambda: pack(8, method="worst-fit"), "`method` is 'worst-fit'"),
    ):
        with pytest.raises(UserError, match=sentence):
            make()


@pytest.mark.parametrize(
    "imports", ["from spark_jobs import shuffle, tokenize", "import spark_jobs.shuffle, spark_jobs.tokenize"]
)
def test_names_of_scripts_are_those_of_transforms(imports):
    program = f"{imports}; import spark_jobs, tokenize as standard; print(spark_jobs.tokenize.__module__, "
    program += "spark_jobs.shuffle.__module__, standard.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["spark_jobs.transforms"] * 2
    assert "spark_jobs" not in done.stdout.split()[2]
