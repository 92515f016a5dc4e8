"""How many parts and buckets tables of any size have."""

from hypothesis import given
from hypothesis import strategies as st

from spark_jobs.placing import buckets_for, parts_for

USUAL = (1 << 23, 1 << 28)


def test_tokens_of_a_task_are_bounded_by_more_parts_not_by_a_number_of_parts():
    assert parts_for(1e6, 0, USUAL, 8) == 8
    assert parts_for(1e9, 0, USUAL, 8) == 120
    assert parts_for(1e11, 0, USUAL, 8) == 2048  # 49 M tokens each
    assert parts_for(25e12, 0, USUAL, 8) == 93_133  # 2^28 tokens each
    assert parts_for(1e9, 4e12, USUAL, 8) == 3726  # of images, 1 GiB each
    assert buckets_for(2048) == 64 * 2048
    assert buckets_for(93_133) == 11 * 93_133


@given(st.floats(0, 1e14), st.floats(0, 1e15))
def test_more_tokens_or_images_never_make_fewer_parts(tokens, image_bytes):
    parts = parts_for(tokens, image_bytes, USUAL, 8)
    assert max(tokens / parts / (1 << 28), image_bytes / parts / (1 << 30)) <= 1
    assert parts_for(2 * tokens, image_bytes, USUAL, 8) >= parts
    assert parts_for(tokens, 2 * image_bytes, USUAL, 8) >= parts
    assert 8 * parts <= buckets_for(parts) <= 64 * parts
