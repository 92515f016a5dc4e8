"""Files of strangers that never end, do not fit, or take for ever to be searched: refused by name, in little memory."""

import resource
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.arguments import parse_arguments
from fft.corpus import readers
from fft.corpus.readers import footer_of, read_documents, read_lines
from fft.errors import UserError

#: What a process may have in all: a text of 4 GB does not fit.
MEMORY = 3 << 30


def compressed(path, block: bytes, times: int):
    """A .zst file of a block, many times."""
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        for _ in range(times):
            stream.write(block)
    return path


@pytest.mark.parametrize("reader", ["read_lines", "read_documents"])
def test_a_text_that_decompresses_to_more_than_memory(reader, tmp_path):
    bomb = compressed(tmp_path / "bomb.txt.zst", bytes(64 << 20), 64)
    assert bomb.stat().st_size < 1 << 20
    code = (
        f"from fft.corpus.readers import {reader} as read\nfrom fft.errors import run_cli\n"
        f"run_cli(lambda: len(list(read({str(bomb)!r}, 0, 0))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.startswith(f"error: {bomb} has a document of 536,870,912 bytes or more, which begins at byte 0")


def test_a_line_that_never_ends():
    with pytest.raises(UserError, match=r"/dev/zero has a document of 1,048,576 bytes or more"):
        next(read_lines("/dev/zero", 0, 0, 1 << 20))


def test_long_lines_are_whole_and_the_one_that_is_too_long_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"a\n" + b"b" * 98 + b"\n" + b"c" * 100 + b"\nd")
    lines = read_lines(str(file), 0, 0, 100)
    assert [next(lines), next(lines)] == [b"a", b"b" * 98]
    with pytest.raises(UserError, match=r"a\.jsonl has a document of 100 bytes or more, which begins at byte 101 "):
        next(lines)


def test_a_text_without_blank_lines_is_not_searched_all_over(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "_BLOCK", 1 << 10)
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\n" * (2 << 20))  # one document; with every block from its beginning, this takes minutes
    begun = time.process_time()
    assert list(read_documents(str(file), 0, 0)) == [file.read_bytes()]
    assert time.process_time() - begun < 10


def test_a_row_group_that_is_made_to_fill_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "_SWOLLEN", 1 << 20)
    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * (4 << 20)]})
    pq.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(UserError, match=r"a\.parquet: row group 1 has [\d,]+ bytes and 4,194,[\d,]+ in memory"):
        footer_of(str(file))
    pq.write_table(table, file, compression="none", use_dictionary=False)
    assert len(footer_of(str(file))[1]) == 1


def test_settings_that_never_end():
    with pytest.raises(UserError, match=r"--config /dev/zero has 1,048,576 letters or more"):
        parse_arguments(["--config", "/dev/zero"])
