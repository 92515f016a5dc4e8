"""Images of micro-batches are those of the rows' documents, at their tokens, in any hands; what is wrong is named."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_tables import GRID_RULES, IMAGE, TILE_RULES, packed_rows, rows_table, write_rows

from fft.data.batches import BatchPlan, Loader, micro_batch, step_batches
from fft.data.reader import SampleReader
from fft.data.table import IGNORE
from fft.images.pixels import patches_of

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
    pairs = list(zip(vars(left).values(), vars(right).values(), strict=True))
    pairs[-1:] = zip(vars(left.images).values(), vars(right.images).values(), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


@EXAMPLES
@given(
    st.integers(0, 1 << 30),
    RULES,
    st.sampled_from(["rows", "best-fit"]),
    st.integers(1, 3),
    st.sampled_from([None, 1, 16, 48]),
)
def test_micro_batches_have_the_images_of_their_documents(tmp_path, seed, rules, pack, size, multiple):
    rng = np.random.default_rng(seed)
    rows = packed_rows(rng, rules, SEQ_LEN, 8)
    table = write_rows(tmp_path / "t", rows_table(rows), rules, SEQ_LEN if pack == "rows" else None)
    reader = SampleReader(table, SEQ_LEN, seed=1, vocab_size=1000, pack=pack).with_images(rules)
    documents, seen = numbered(rows), 0
    for first in range(0, reader.samples_per_epoch + size, size):  # the last are blank
        batch = micro_batch(reader, range(first, first + size), reader.samples_per_epoch, multiple)
        check(batch, documents, rules)
        seen += len(batch.images.grids) - 1
    assert seen == sum(len(one.grids) for one in documents.values())


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
