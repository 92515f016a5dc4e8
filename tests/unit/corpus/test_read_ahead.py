"""Files read ahead are what they are, wherever one begins and however much one takes at a time."""

import io
import random
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.corpus import read_ahead
from fft.corpus.read_ahead import ReadAhead


class Counting:
    """A file in memory that tells what it was asked, and takes its time."""

    def __init__(self, data: bytes, delay: float = 0.0) -> None:
        self._file, self._delay, self.asked = pa.BufferReader(data), delay, []

    def size(self) -> int:
        return self._file.size()

    def read_at(self, size: int, offset: int) -> bytes:
        time.sleep(self._delay)
        self.asked.append(offset)
        return self._file.read_at(size, offset)

    def close(self) -> None:
        self._file.close()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 300), st.integers(1, 40), st.randoms())
def test_any_way_through_a_file_gives_its_bytes(size, block, until, buffered, chance):
    data = random.Random(size).randbytes(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "BLOCK", block)
        with io.BufferedReader(ReadAhead(Counting(data), until), buffered) as stream:
            theirs = io.BytesIO(data)
            for _ in range(12):
                if chance.random() < 0.3:
                    offset = chance.randint(0, size + 5)
                    assert stream.seek(offset) == theirs.seek(offset)
                if chance.random() < 0.3:
                    assert stream.readline() == theirs.readline()
                count = chance.choice([1, 7, 60, -1])
                assert stream.read(count) == theirs.read(count)


def test_the_next_block_is_under_way_and_none_after_the_part(monkeypatch):
    monkeypatch.setattr(read_ahead, "BLOCK", 10)
    file = Counting(bytes(100), 0.02)
    with io.BufferedReader(ReadAhead(file, 50), 10) as stream:
        begin, waited = time.monotonic(), 0.0
        for _ in range(5):
            stream.read(10)
            time.sleep(0.03)  # what is done with it
            waited = time.monotonic() - begin
    assert file.asked == [0, 10, 20, 30, 40]
    assert waited < 5 * 0.05 + 0.2


def test_an_error_of_the_file_is_raised_where_its_bytes_are_wanted(monkeypatch):
    monkeypatch.setattr(read_ahead, "BLOCK", 10)
    file = Counting(bytes(100))
    with io.BufferedReader(ReadAhead(file), 10) as stream:
        assert stream.read(10) == bytes(10)
        file._file.close()
        with pytest.raises(ValueError, match="closed"):
            stream.read(50)
