"""Tables of chats with images: every record accounted for, every image carried by every job, on every engine alike."""

import base64
import json
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from vision_models import chat_of, picture, save_model

from fft.data.batches import micro_batch
from fft.data.image_batches import run_rules
from fft.data.manifest import read_manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.errors import UserError
from fft.images.pixels import patches_of
from fft.images.rules import ImageRules
from spark.helpers import files_of, rows_of
from spark.test_engines import same_files
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

CHATS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "qwen2_vl")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def chats(images, tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(chat_of(rng, images, number)[0]) + "\n" for number in range(CHATS)))
    return path


@pytest.fixture(scope="module")
def flags(model, images):
    return {"tokenizer": model, "task": "chat", "image_path": images}


@pytest.fixture(scope="module")
def table(spark, chats, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "t"
    tokenize_table(chats, folder, **flags)
    return folder


@pytest.fixture(scope="module")
def packed(spark, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    shuffle_tables(table, folder / "s", holdout=0.2, num_block=3)
    repartition_table(folder / "s", folder / "p", max_len=256, num_partition=2)
    return folder


def documents_of(*tables):
    """Every document's ids, labels, images and grids by its id; images belong to it by how many tokens they have."""
    found = {}
    for folder in tables:
        rules = ImageRules.of(read_manifest(folder).vision, "it")
        for row in rows_of(folder):
            grids, bounds = (
                np.array(row["image_grids"]).reshape(-1, 3),
                row.get("cu_seqlens", [0, len(row["input_ids"])]),
            )
            assert len(row["images"]) == len(grids)
            image = 0
            for name, begin, end in zip(row["doc_ids"], bounds, bounds[1:], strict=False):
                tokens, first = row["input_ids"][begin:end].count(rules.image_token), image
                while tokens:
                    tokens -= grids[image].prod() // rules.merge**2
                    image += 1
                own = [row["input_ids"][begin:end], row["labels"][begin:end], row["images"][first:image]]
                found.setdefault(name, []).append([*own, grids[first:image].tolist()])
            assert image == len(grids)
    return found


def test_images_follow_their_documents_through_all_jobs(table, packed, images):
    whole = documents_of(table)
    assert len(whole) == CHATS
    assert sum(len(document[2]) for (document,) in whole.values()) > 25
    for folder in ("s", "p"):
        assert documents_of(packed / folder / "train", packed / folder / "validation") == whole
    counts = read_manifest(packed / "p" / "train").lineage["counts"]["vision"]
    rows = rows_of(packed / "p" / "train")
    assert counts["images"] == sum(len(row["images"]) for row in rows)
    assert counts["image_bytes"] == sum(len(image) for row in rows for image in row["images"])
    pad = read_manifest(table).vision["image_token"]
    assert counts["image_tokens"] == sum(row["input_ids"].count(pad) for row in rows)
    assert sum(counts["images_per_row"].values()) == len(rows)


@pytest.mark.parametrize("job", ["p", "s"])
def test_what_jobs_write_is_what_is_trained_on(packed, job):
    """Every document of a table with its images, decoded, once an epoch: of packed rows, and of rows packed here."""
    table = Table.open(packed / job / "train")
    rules, pack = run_rules([table]), "best-fit" if job == "s" else "cut"
    reader = SampleReader(table, 256, 0, pack=pack).with_images(rules)
    left = {tuple(ids): (files, grids) for ((ids, _, files, grids),) in documents_of(packed / job / "train").values()}
    for index in range(reader.samples_per_epoch):
        batch, image, patch = micro_batch(reader, [index], reader.samples_per_epoch), 0, 0
        for begin, end in pairwise(np.unique(batch.cu_seqlens).tolist()):
            files, grids = left.pop(tuple(batch.input_ids[0, begin:end].tolist()), ([], []))
            for file, grid in zip(files, grids, strict=True):
                assert batch.images.grids[image].tolist() == grid
                expected = patches_of(file, grid, rules)
                assert (batch.images.patches[patch : patch + len(expected)] == expected).all()
                image, patch = image + 1, patch + len(expected)
        assert (len(batch.images.grids), len(batch.images.patches)) == (image + 1, patch + rules.merge**2)
    assert not left


def test_the_same_bytes_on_sail(launch, chats, table, packed, model, images, tmp_path):
    flags = ("--task", "chat", "--tokenizer", model, "--image_path", images)
    jobs = [
        ("tokenize", "-i", chats, "-o", tmp_path / "t", *flags),
        ("shuffle", "-i", table, "-o", tmp_path / "s", "--holdout", "0.2", "--num_block", "3"),
        ("repartition", "-i", packed / "s", "-o", tmp_path / "p", "--max_len", "256", "--num_partition", "2"),
    ]
    for job, *rest in jobs:
        done = launch(sys.executable, f"spark_jobs/{job}.py", *rest, env={"FFT_ENGINE": "sail"})
        assert done.returncode == 0, done.stderr
    assert same_files(tmp_path / "t", table)
    for split in ("train", "validation"):
        assert same_files(tmp_path / "s" / split, packed / "s" / split)
        assert same_files(tmp_path / "p" / split, packed / "p" / split)


def test_columns_of_bytes_give_the_same_rows(spark, images, flags, tmp_path):
    """As `datasets` writes them; in a file, in a DataFrame, and the same in JSON lines."""
    rng, rows = np.random.default_rng(1), []
    for number in range(12):
        data = [picture(rng) for _ in range(number % 3)]
        text = f"{number} " + "<image> and " * len(data)
        rows.append({"id": str(number), "messages": [{"role": "user", "content": text}], "data": data})
        rows[-1]["messages"].append({"role": "assistant", "content": "a cat"})
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    kind = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns = {
        "id": pa.array([row["id"] for row in rows]),
        "messages": pa.array([row["messages"] for row in rows], pa.list_(turn)),
        "images": pa.array([[{"bytes": data, "path": "x.png"} for data in row["data"]] for row in rows], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    plain = columns | {"images": pa.array([row["data"] for row in rows], pa.list_(pa.binary()))}
    pq.write_table(pa.table(plain), tmp_path / "b.parquet")
    with open(tmp_path / "c.jsonl", "w") as stream:
        for row in rows:
            urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in row.pop("data")]
            stream.write(json.dumps(row | {"images": urls}) + "\n")
    inputs = {"a": tmp_path / "a.parquet", "b": tmp_path / "b.parquet", "c": tmp_path / "c.jsonl"}
    inputs["d"] = spark.read.parquet(str(tmp_path / "a.parquet"))
    for name, given in inputs.items():
        tokenize_table(given, tmp_path / name, **flags)
    by_id = [sorted(rows_of(tmp_path / name), key=lambda row: row["doc_ids"]) for name in inputs]
    assert len(by_id[0]) == 12
    assert all(rows == by_id[0] for rows in by_id)


def test_malformed_images_are_named_or_set_aside(spark, chats, images, flags, tmp_path):
    (images / "cut.jpg").write_bytes(picture(np.random.default_rng(2), "jpeg")[:200])
    bad = [{"id": "bad", "messages": [{"user": ["<image>", name]}, {"assistant": "y"}]} for name in ("cut.jpg", "none")]
    lines = chats.read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:30], *map(json.dumps, bad), *lines[30:]]))
    with pytest.raises(UserError, match=r"a.jsonl, line 31: image 1 \(cut.jpg\) cannot be read"):
        tokenize_table(tmp_path / "a.jsonl", tmp_path / "out", **flags)
    manifest = tokenize_table(tmp_path / "a.jsonl", tmp_path / "out", **flags, on_error="quarantine")
    counts = manifest.lineage["counts"]
    assert (counts["documents_in"], counts["documents_out"], counts["quarantined"]) == (CHATS + 2, CHATS, 2)
    aside = [json.loads(line) for path in (tmp_path / "out" / "_quarantine").iterdir() for line in path.open()]
    assert {json.loads(record["record"])["messages"][0]["user"][1] for record in aside} == {"cut.jpg", "none"}


def test_delta_dedup_and_tables_without_images(spark, table, flags, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps([{"user": "hello"}, {"assistant": "world"}]) + "\n")
    tokenize_table(texts, tmp_path / "texts", flags["tokenizer"], task="chat", format="delta")
    shuffle_tables([table, tmp_path / "texts"], tmp_path / "mixed", num_block=2, format="delta")
    mixed = rows_of(tmp_path / "mixed")
    assert len(mixed) == CHATS + 1
    assert [row["images"] for row in mixed if len(row["doc_ids"][0]) == 32] == [[]]
    assert Table.open(tmp_path / "mixed").manifest.vision == read_manifest(table).vision
    twice = tmp_path / "twice"
    shuffle_tables([table, tmp_path / "mixed"], twice, dedup=True, num_block=2)
    assert len(rows_of(twice)) == CHATS + 1


def test_what_would_cut_images_or_mix_them_is_refused(spark, table, chats, flags, tmp_path):
    with pytest.raises(UserError, match=r"concat cuts anywhere, but .* has images"):
        repartition_table(table, tmp_path / "p", max_len=256, pack="concat")
    with pytest.raises(UserError, match=r"document chat \d+ has images and \d+ tokens, which rows of at most 40"):
        repartition_table(table, tmp_path / "p", max_len=40)
    assert not (tmp_path / "p").exists()
    tokenize_table(chats, tmp_path / "small", **flags, max_pixels=2000)
    with pytest.raises(UserError, match="were read with another max_pixels: tokenize both"):
        shuffle_tables([table, tmp_path / "small"], tmp_path / "s")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    pq.write_table(pq.read_table(files_of(table)[0]), foreign / "a.parquet")
    with pytest.raises(UserError, match="foreign has images and no manifest that says what their grids mean"):
        shuffle_tables(foreign, tmp_path / "s")


def test_a_model_without_images_refuses_them_by_one_sentence(table, tmp_path):
    with pytest.raises(UserError, match="has images, and the model takes none: give a model of type qwen2_vl, "):
        Table.open(table).check_trainable()
    Table.open(table).check_trainable(takes_images=True)
    rows = pq.read_table(files_of(table)[0])
    for lacking in ("images", "image_grids"):
        (tmp_path / lacking).mkdir()
        pq.write_table(rows.drop_columns([lacking]), tmp_path / lacking / "a.parquet")
        with pytest.raises(UserError, match=f"and none {lacking}, without which it is not read"):
            Table.open(tmp_path / lacking)
