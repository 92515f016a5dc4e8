"""Images of micro-batches are those of the rows' documents, at their tokens, in any hands; what is wrong is named."""

import itertools
import json
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_tables import GRID_RULES, IMAGE, TILE_RULES, Document, packed_rows, png, rows_table, write_rows
from vision_models import FAMILIES, chat_of, save_model, theirs

from fft.data.batches import BatchPlan, Loader, micro_batch, step_batches
from fft.data.blend import Blend
from fft.data.image_batches import EncodedImages, StepDecoding, run_rules
from fft.data.reader import SampleReader
from fft.data.row_images import RowImages
from fft.data.table import IGNORE, Table
from fft.data.trace import documents_of_step, steps_of_document
from fft.errors import UserError
from fft.images.pixels import normalized, patches_of
from fft.images.rules import ImageLimits, ImageSettings, check_rules
from fft.text.chat import load_chat
from fft.text.encoder import Encoder

EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEQ_LEN = 64
RULES = st.sampled_from([GRID_RULES, TILE_RULES])


def slow_positions(document, rules):
    """Token by token, as the definition of rotary embeddings of three axes has them."""
    if rules is TILE_RULES:
        return [[at] * 3 for at in range(len(document.ids))]
    found, following, grids, ids = [], 0, iter(document.grids), list(document.ids)
    while ids:
        if ids[0] != IMAGE:
            found.append([following] * 3)
            following, ids = following + 1, ids[1:]
            continue
        _, high, wide = next(grids)
        for y, x in itertools.product(range(high // 2), range(wide // 2)):
            found.append([following, following + y, following + x])
        following, ids = following + max(high, wide) // 2, ids[high * wide // 4 :]
    return found


def expected(batch, documents, rules):
    """What a micro-batch must have beside its ids and boundaries, from the documents that it turns out to hold."""
    ids = batch.input_ids[0].tolist()
    bounds = [*np.unique(batch.cu_seqlens).tolist(), len(ids)]
    labels, positions, grids, patches = [], [], [], []
    for begin, end in itertools.pairwise(bounds):
        own = documents.get(ids[begin]) if begin < end else None
        if own is None:
            positions += [[at] * 3 for at in range(end - begin)]
            labels += [IGNORE] * (end - begin)
            continue
        assert ids[begin:end] == own.ids
        labels += [IGNORE if token == IMAGE else token for token in own.ids[1:]] + [IGNORE]
        positions += slow_positions(own, rules)
        grids += own.grids
        patches += [patches_of(data, grid, rules) for data, grid in zip(own.files, own.grids, strict=True)]
    blank = 4
    patches.append(np.zeros((blank, 48), np.uint8))
    grids.append((1, 2, 2))
    index = [at for at, token in enumerate(ids) if token == IMAGE]
    return labels, np.array(positions).T, [*index, -1], np.array(grids), np.concatenate(patches)


def check(batch, documents, rules):
    labels, positions, index, grids, patches = expected(batch, documents, rules)
    assert batch.labels.tolist() == labels
    assert batch.trained == sum(label != IGNORE for label in labels)
    images = batch.images
    for found, right, kind in (
        (images.positions, positions, np.int32),
        (images.index, index, np.int32),
        (images.grids, grids, np.int32),
        (images.patches, patches, np.uint8),
    ):
        assert found.dtype == kind
        np.testing.assert_array_equal(found, right)


def numbered(rows):
    return {document.ids[0]: document for row in rows for document in row}


def same(left, right):
    """Two micro-batches, array by array."""
    parts = [{**vars(batch), "images": None, **vars(batch.images)} for batch in (left, right)]
    assert parts[0].keys() == parts[1].keys()
    for name, one in parts[0].items():
        np.testing.assert_array_equal(one, parts[1][name])


@EXAMPLES
@given(
    st.integers(0, 1 << 30),
    RULES,
    st.sampled_from(["rows", "best-fit"]),
    st.integers(1, 3),
    st.sampled_from([None, 1, 16, 48]),
    st.booleans(),
)
def test_micro_batches_have_the_images_of_their_documents(tmp_path, seed, rules, pack, size, multiple, labels):
    """Also of a table whose labels do not leave out the tokens of images."""
    rng = np.random.default_rng(seed)
    rows = packed_rows(rng, rules, SEQ_LEN, 8)
    columns = rows_table(rows)
    columns = columns.append_column("labels", columns["input_ids"]) if labels else columns
    table = write_rows(tmp_path / "t", columns, rules, SEQ_LEN if pack == "rows" else None)
    reader = SampleReader(table, SEQ_LEN, seed=1, vocab_size=1000, pack=pack).with_images(rules)
    documents, seen = numbered(rows), 0
    for first in range(0, reader.samples_per_epoch + size, size):  # the last are blank
        batch = micro_batch(reader, range(first, first + size), reader.samples_per_epoch, multiple)
        check(batch, documents, rules)
        seen += len(batch.images.grids) - 1
    assert seen == sum(len(one.grids) for one in documents.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_on_is_what_transformers_makes_of_the_chats(tmp_path, family):
    """From records by the code that writes tables to patches: ids, grids, and pixels to 1e-6."""
    model, rng = save_model(tmp_path / "model", family), np.random.default_rng(7)
    files = tmp_path / "files"
    files.mkdir()
    chats = [chat_of(rng, files, number) for number in range(12)]
    chat, info = load_chat(model, "id", None, ImageSettings(str(files), ImageLimits()))
    documents = [chat.parse("json", json.dumps(record).encode(), None) for record, _, _ in chats]
    batch, _ = chat.token_rows(documents, Encoder(chat.recipe))
    rules = chat.images.rules
    table = write_rows(tmp_path / "t", pa.Table.from_batches([batch]), rules)
    longest = max(batch.column("input_ids").value_lengths().to_pylist())
    reader = SampleReader(table, longest, 0, info.vocab_size, shuffle=False, pack="best-fit").with_images(rules)
    made = micro_batch(reader, range(reader.samples_per_epoch), reader.samples_per_epoch)
    colours, at = normalized(made.images.patches, rules), 0
    known = {tuple(ids): values for ids, values in (theirs(model, messages, own) for _, messages, own in chats)}
    for begin, end in itertools.pairwise(np.unique(made.cu_seqlens).tolist()):
        values = known.pop(tuple(made.input_ids[0, begin:end].tolist()), None)
        if not values:
            continue
        pixels = values["pixel_values"]
        if family == "internvl":
            pixels = pixels.reshape(len(pixels), 3, 4, 7, 4, 7).transpose(0, 2, 4, 1, 3, 5)
        else:
            pixels = pixels.reshape(len(pixels), 3, 2, -1)[:, :, 0]
        pixels = pixels.reshape(-1, 3 * rules.patch**2)
        assert np.abs(colours[at : at + len(pixels)] - pixels).max() <= 1e-6
        at += len(pixels)
    assert not known
    assert made.images.grids[:-1].prod(1).sum() == at == len(made.images.patches) - made.images.grids[-1].prod()
    assert (made.labels[made.images.index[:-1] - 1] == IGNORE).all()


@pytest.fixture(scope="module")
def rows():
    return packed_rows(np.random.default_rng(5), GRID_RULES, SEQ_LEN, 60)


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("images"), rows_table(rows), GRID_RULES, SEQ_LEN)


@pytest.fixture(scope="module")
def reader(table):
    return SampleReader(table, SEQ_LEN, seed=1).with_images(GRID_RULES)


def test_the_loader_gives_what_is_read_at_once_and_goes_on_anywhere(reader, rows):
    plan, total = BatchPlan(2, 1, 2, 3), 2 * reader.samples_per_epoch
    loader, states, steps = Loader(reader, plan, total), [], []
    for step in loader:
        states.append(loader.state_dict())
        steps.append(step)
    for number, step in enumerate(steps):
        for left, right in zip(step, step_batches(reader, plan, number * 12, total), strict=True):
            same(left, right)
            check(left, numbered(rows), GRID_RULES)
    assert states[2] == {"epoch": 0, "samples": 36, **reader.identity}
    resumed = Loader(reader, plan, total)
    resumed.load_state_dict(states[2])
    for step, again in zip(steps[3:], resumed, strict=True):
        for left, right in zip(step, again, strict=True):
            same(left, right)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    ids = [[1000 + number, *range(10, 10 + number % 30)] for number in range(90)]
    columns = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))})
    return write_rows(folder, columns, GRID_RULES)


def blend_of(table, texts):
    readers = [SampleReader(table, SEQ_LEN, 1), SampleReader(texts, SEQ_LEN, 1, pack="best-fit")]
    return Blend(readers, [0.6, 0.4]).with_images(run_rules([table, texts]))


def test_a_step_of_a_blend_is_the_same_in_any_hands(table, texts, rows):
    """Replicas, micro-batches and a stop in between change nothing; rows of texts have the blank image."""
    blend, total = blend_of(table, texts), 96
    whole = [batch for step in Loader(blend, BatchPlan(1, 0, 12, 1), total) for batch in step]
    assert {len(batch.images.grids) == 1 for batch in whole} == {True, False}
    documents = numbered(rows) | {
        1000 + number: Document([1000 + number, *range(10, 10 + number % 30)], [], []) for number in range(90)
    }
    for batch in whole:
        check(batch, documents, GRID_RULES)
    for replicas, size in ((2, 2), (3, 1), (4, 3)):
        for replica in range(replicas):
            loader = Loader(
                blend.for_stage(True, True, images=True),
                BatchPlan(replicas, replica, 12 // replicas // size, size),
                total,
            )
            samples = iter(whole[replica::replicas])
            for batch in itertools.chain(*loader):
                own = list(itertools.islice(samples, size))
                np.testing.assert_array_equal(batch.images.positions, np.hstack([one.images.positions for one in own]))
                for name, blank in (("grids", 1), ("patches", 4)):
                    parts = [getattr(one.images, name)[:-blank] for one in own]
                    np.testing.assert_array_equal(getattr(batch.images, name)[:-blank], np.concatenate(parts))


def test_ranks_share_out_the_images_of_a_step(reader):
    """All know all grids; each decodes what was dealt to it."""
    plan, total = BatchPlan(1, 0, 4, 2), reader.samples_per_epoch

    def dealt(rank):
        def chosen(grids):
            assert len(grids) == 4
            return [range(rank, len(own), 3) for own in grids]

        return chosen

    ranks = [Loader(reader, plan, total, dealt(rank)) for rank in range(3)]
    for whole, *shares in zip(Loader(reader, plan, total), *ranks, strict=True):
        for batch, *own in zip(whole, *shares, strict=True):
            sizes = batch.images.grids.prod(1)
            images = np.split(batch.images.patches, np.cumsum(sizes)[:-1])
            for rank, share in enumerate(own):
                np.testing.assert_array_equal(share.images.grids, batch.images.grids)
                expected = [*images[:-1][rank::3], images[-1]]
                np.testing.assert_array_equal(share.images.patches, np.concatenate(expected))


def test_who_needs_no_pixels_does_not_read_their_bytes(table, texts, monkeypatch):
    asked, decode = Counter(), pq.ParquetFile.read_row_group

    def read(self, index, columns, **options):
        asked.update(columns)
        return decode(self, index, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    reader = blend_of(table, texts)
    whole = micro_batch(reader, range(20), 20)
    assert asked["images"] == asked["image_grids"] > 0
    asked.clear()
    for ids, labels in ((True, False), (False, True), (True, True)):
        own = micro_batch(reader.for_stage(ids, labels), range(20), 20)
        for name in ("positions", "index", "grids"):
            np.testing.assert_array_equal(getattr(own.images, name), getattr(whole.images, name))
        assert own.images.patches.shape == (4, 48)
        if labels:
            assert own.labels.tolist() == whole.labels.tolist()
    assert (asked["images"], asked["image_grids"] > 0) == (0, True)
    asked.clear()
    assert micro_batch(SampleReader(table, SEQ_LEN, 1), range(3), 3).images is None
    assert asked.keys() == {"input_ids", "cu_seqlens"}


def test_so_much_is_decoded_ahead_and_no_more(table):
    class Pool:
        asked = 0

        def submit(self, task, *arguments):
            self.asked += 1
            done = Future()
            done.set_result(task(*arguments))
            return done

    loaded = table.check(0, table.load(0, more=("image_grids", "images")), rules=GRID_RULES).images
    grids = np.concatenate([loaded.grids, [(1, 2, 2)]])
    numbers, positions = [(loaded, number) for number in range(len(loaded.grids))], np.empty((3, 0), np.int32)
    sizes, pool = grids[:-1].prod(1) * 48, Pool()
    decoding = StepDecoding([EncodedImages(positions, positions[0], grids, numbers)], GRID_RULES, pool=pool)
    decoding.begin(int(sizes[:3].sum()) + 1)
    assert pool.asked == 3
    (made,) = decoding.batches()
    assert pool.asked == len(sizes) > 4
    (at_once,) = StepDecoding([EncodedImages(positions, positions[0], grids, numbers)], GRID_RULES).batches()
    np.testing.assert_array_equal(made.patches, at_once.patches)


def test_the_next_step_is_decoded_while_one_is_computed(reader, monkeypatch):
    decoded, decode = [], RowImages.decode
    monkeypatch.setattr(RowImages, "decode", lambda self, *rest: decoded.append(rest[0]) or decode(self, *rest))
    steps = iter(Loader(reader, BatchPlan(1, 0, 1, 6), 18))
    seen = 0
    for left in (2, 1, 0):
        ((batch,), before) = next(steps), seen
        seen += len(batch.images.grids) - 1
        end = time.monotonic() + 300
        while len(decoded) == seen and left and time.monotonic() < end:
            time.sleep(0.01)  # as a trainer that computes
        assert (len(decoded) > seen) == (left > 0)
        assert seen > before
    assert (len(decoded), next(steps, None)) == (seen, None)


def test_a_step_of_many_row_groups_reads_each_once(tmp_path, monkeypatch):
    rows = packed_rows(np.random.default_rng(3), GRID_RULES, 16, 256)
    table = write_rows(tmp_path / "t", rows_table(rows), GRID_RULES, 16, row_group_size=2)
    read, load = Counter(), Table.load
    monkeypatch.setattr(Table, "load", lambda self, group, *rest: read.update([group]) or load(self, group, *rest))
    reader = SampleReader(table, 16, seed=0, lanes=8).with_images(GRID_RULES)
    for _ in Loader(reader, BatchPlan(1, 0, 4, 32), reader.samples_per_epoch):
        pass
    assert set(read.values()) == {1}


def test_what_a_step_saw_of_images_is_traced(reader, rows):
    documents, back = numbered(rows), {}
    for step in range(1, 6):
        for seen in documents_of_step(reader, step, 4):
            own = documents[100 + int(seen.doc_id[1:])]
            expected = [f"{'x'.join(map(str, g))}:{len(f)}" for g, f in zip(own.grids, own.files, strict=True)]
            assert seen.images == " ".join(expected)
            back.setdefault(seen.doc_id, []).append(seen)
    name, found = next((name, seen) for name, seen in back.items() if seen[0].images)
    assert next(iter(steps_of_document(reader, name, 4, 1))) == found[0]


def changed(table, **columns):
    """A table whose rows have other values in some columns."""
    for name, change in columns.items():
        values = table[name].to_pylist()
        kind = table.schema.field(name).type
        change(values)
        table = table.set_column(table.schema.names.index(name), name, pa.array(values, kind))
    return table


def swap(row):
    """Takes the image of a row apart: its last token changes places with the text after it."""
    at = max(i for i, token in enumerate(row) if token == IMAGE)
    row[at], row[at + 1] = row[at + 1], row[at]


WRONG = {
    "another number of tokens of images than its image_grids": {"image_grids": lambda v: v[1].extend([1, 2, 2])},
    "has image_grids of which not all are three numbers": {"image_grids": lambda v: v[1].append(1)},
    "has image_grids that are none": {"image_grids": lambda v: v.__setitem__(1, [1, 3, 2])},
    "the tokens of an image do not lie together": {"input_ids": lambda v: swap(v[1])},
    "has a document that ends in an image": {"cu_seqlens": lambda v: v[1].insert(1, v[1][0] + 2)},
    "has another number of images than of image_grids": {"images": lambda v: v[1].append(b"x")},
}


@pytest.fixture(scope="module")
def simple():
    """Three rows of one document: two texts around an image of four tokens."""
    one = Document([100, *[IMAGE] * 4, 20, 21], [png(np.random.default_rng(0), 16, 16)], [(1, 4, 4)])
    return rows_table([[one]] * 3)


@pytest.mark.parametrize("said", WRONG)
def test_images_that_do_not_belong_to_their_tokens_are_named(tmp_path, simple, said):
    table = write_rows(tmp_path, changed(simple, **WRONG[said]), GRID_RULES)
    reader = SampleReader(table, SEQ_LEN, 0, pack="best-fit", shuffle=False).with_images(GRID_RULES)
    with pytest.raises(UserError, match=rf"part-0\.parquet, row group 0, row 1:? .*{said}.*: write the table again"):
        micro_batch(reader, range(3), 3)


@pytest.mark.parametrize("column", ["images", "image_grids"])
def test_nulls_among_images_are_refused(tmp_path, simple, column):
    for null in (lambda v: v.__setitem__(1, None), lambda v: v[1].append(None)):
        table = write_rows(tmp_path, changed(simple, **{column: null}), GRID_RULES)
        reader = SampleReader(table, SEQ_LEN, 0, pack="best-fit") if column == "images" else None
        with pytest.raises(UserError, match=f"column {column} holds nulls: write the table again without them"):
            micro_batch((reader or SampleReader(table, SEQ_LEN, 0, pack="best-fit")).with_images(GRID_RULES), [0], 1)


@settings(EXAMPLES, max_examples=60)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(["input_ids", "cu_seqlens", "image_grids"]),
    st.sampled_from(["set", "drop", "insert"]),
    st.sampled_from([-(1 << 31), -1, 0, 1, 2, 3, 4, IMAGE, 8, 1 << 30]),
)
def test_a_table_that_was_tampered_with_is_refused_or_means_what_it_says(tmp_path, seed, column, how, value):
    """Whatever number changes, no micro-batch has other images than its grids and tokens say."""
    rng = np.random.default_rng(seed)
    columns = rows_table(packed_rows(rng, GRID_RULES, 32, 3))
    values = columns[column].to_pylist()
    row = int(rng.integers(0, 3))
    at = int(rng.integers(0, len(values[row]) + (how == "insert") or 1))
    if how == "set" and at < len(values[row]):
        values[row][at] = value
    elif how == "drop":
        del values[row][at : at + 1]
    else:
        values[row].insert(at, value)
    columns = changed(columns, **{column: lambda v: v.__setitem__(row, values[row])})
    batch = None
    try:
        reader = SampleReader(write_rows(tmp_path / "t", columns, GRID_RULES), 40, 0, 1000, pack="best-fit")
        batch = micro_batch(reader.with_images(GRID_RULES), range(3), 3)
    except UserError as error:
        refused = str(error)
    if batch is None:
        assert "part-0.parquet, row group" in refused
        return
    images = batch.images
    assert (
        (images.grids[:, 1:].prod(1) // 4).sum() == len(images.index) == np.count_nonzero(batch.input_ids == IMAGE) + 1
    )
    assert len(images.patches) == images.grids.prod(1).sum()
    assert (images.positions[:, batch.cu_seqlens[:-1][batch.cu_seqlens[:-1] < 120]] == 0).all()


def test_lists_of_other_widths_are_read_alike(tmp_path, simple):
    """As other writers than Spark have them: 64 bits of offsets and of numbers."""
    wide = simple.cast(
        pa.schema(
            {
                **dict.fromkeys(("input_ids", "cu_seqlens", "image_grids"), pa.large_list(pa.int64())),
                "doc_ids": pa.list_(pa.string()),
                "images": pa.large_list(pa.large_binary()),
            }
        )
    )
    made = [
        micro_batch(
            SampleReader(write_rows(tmp_path / name, columns, GRID_RULES), 8, 0, pack="best-fit").with_images(
                GRID_RULES
            ),
            range(3),
            3,
        )
        for name, columns in (("narrow", simple), ("wide", wide))
    ]
    same(*made)
    assert made[1].images.grids.dtype == np.int32


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, simple):
    table = write_rows(tmp_path, changed(simple, images=lambda v: v.__setitem__(2, [v[2][0][:60]])), GRID_RULES)
    reader = SampleReader(table, SEQ_LEN, 0, pack="best-fit", shuffle=False).with_images(GRID_RULES)
    named = r"part-0\.parquet, row group 0, row 2: image 1 cannot be read \(.*\): write the table again without it"
    with pytest.raises(UserError, match=named):
        list(Loader(reader, BatchPlan(1, 0, 1, 1), 3))
    micro_batch(reader.for_stage(True, True), range(3), 3)  # not by who needs no pixels


def test_texts_with_tokens_of_images_are_refused_in_a_run_with_images(tmp_path):
    columns = pa.table({"input_ids": pa.array([[9] * 8, [9, IMAGE, 9]], pa.list_(pa.int32()))})
    reader = SampleReader(write_rows(tmp_path, columns, GRID_RULES), 8, 0)
    micro_batch(reader, [0, 1], 2)
    with pytest.raises(
        UserError, match=r"row 1 has tokens of images \(id 7\), but no images: take them out of the texts"
    ):
        micro_batch(reader.with_images(GRID_RULES), [0, 1], 2)


def test_rows_with_images_are_never_cut(table, tmp_path, simple):
    with pytest.raises(
        UserError, match="has images, which --pack cut would cut: give --pack best-fit, or pack the table"
    ):
        SampleReader(table, SEQ_LEN + 1, 0)
    tokens = len(simple["input_ids"][0])
    small = write_rows(tmp_path, simple, GRID_RULES)
    assert SampleReader(small, tokens, 0, pack="best-fit").samples_per_epoch == 3
    with pytest.raises(UserError, match=rf"row 0 has images and {tokens} tokens, more than --seq_len {tokens - 1}"):
        SampleReader(small, tokens - 1, 0, pack="best-fit")


def test_the_rules_of_a_run_are_those_of_all_its_tables(table, texts, tmp_path, simple):
    assert run_rules([texts]) is None
    assert run_rules([texts, table]) == GRID_RULES
    other = write_rows(tmp_path / "other", simple, replace(GRID_RULES, max_pixels=64))
    with pytest.raises(UserError, match=r"other was made with max_pixels = 64 of images, .* with 640: make both"):
        run_rules([table, texts, other])
    (tmp_path / "foreign").mkdir()
    pq.write_table(simple, tmp_path / "foreign" / "a.parquet")
    with pytest.raises(UserError, match="foreign has images and no manifest that says what their grids mean"):
        run_rules([Table.open(tmp_path / "foreign")])
    assert table.fingerprint != other.fingerprint


def test_a_model_has_the_rules_of_its_tables():
    check_rules(GRID_RULES, replace(GRID_RULES, family="qwen2_5_vl", min_pixels=1, max_pixels=99), "t")
    with pytest.raises(UserError, match=r"t has images as grids of patches, .* of type internvl, takes tiles"):
        check_rules(GRID_RULES, TILE_RULES, "t")
    for name, value in (("patch", 8), ("merge", 1), ("temporal", 1), ("image_token", 9), ("mean", (0.5,) * 3)):
        with pytest.raises(
            UserError, match=rf"t was made with {name} = .* of images, the model has .*: make the table"
        ):
            check_rules(GRID_RULES, replace(GRID_RULES, **{name: value}), "t")
