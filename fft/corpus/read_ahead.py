"""Files of a store as streams whose next block is under way while one is used."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

#: Bytes that are asked for at once: a request takes its time, however small it is.
BLOCK = 8 << 20


class ReadAhead(io.RawIOBase):
    """The bytes of a file of any of pyarrow's file systems, read from its begin or from where :meth:`seek` leads.

    Nothing is asked for in advance from byte ``until`` on, if that is given: who reads a part of a file seldom needs
    more of it than the end of a line. Raises :class:`OSError` as the file does.
    """

    def __init__(self, file: pa.NativeFile, until: int = 0) -> None:
        self._file, self._size = file, file.size()
        self._until, self._at = min(until or self._size, self._size), 0
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._begin, self._block = 0, memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The next byte's place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go on from there."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the block goes that is at hand."""
        offset = self._at - self._begin
        if self._at >= self._size:
            return 0
        if not 0 <= offset < len(self._block):
            self._load()
            offset = 0
        piece = self._block[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        """Let go of the file; what is under way is waited for."""
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._file.close()
        super().close()

    def _load(self) -> None:
        """Have the block at hand that begins at the next byte, and the one after it under way."""
        begin, answer = self._ahead or (-1, None)
        data = answer.result() if answer is not None and begin == self._at else self._file.read_at(BLOCK, self._at)
        self._begin, self._block = self._at, memoryview(data)
        after = self._at + len(data)
        under_way = after < self._until
        self._ahead = (after, self._pool.submit(self._file.read_at, BLOCK, after)) if under_way else None
