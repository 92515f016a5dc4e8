"""What goes wrong with stores and mounts, for tests: a server that is busy, tasks that fail, a mount that refuses."""

import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

BUSY = (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>")
EXPIRED = (403, b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>")


FULL = (507, b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has no free space.</Message></Error>")


def throttled(server: str, one_in: int = 10):
    """A proxy of an S3 server that answers one request in so many with HTTP 503: its URL, and counts of requests."""
    return refusing(server, lambda asked: asked % one_in == 0, BUSY)


def expiring(server: str, after: int):
    """The same, which says after so many requests that credentials have expired."""
    return refusing(server, lambda asked: asked > after, EXPIRED)


def full(server: str, after: int):
    """The same, which has no room after so many requests for what is written."""
    return refusing(server, lambda asked: asked > after, FULL, ("PUT", "POST"))


@contextmanager
def refusing(server: str, refuses: Callable[[int], bool], answer: tuple[int, bytes], methods: tuple[str, ...] = ()):
    """A proxy of an S3 server with another answer to requests of some numbers, of those with the ``methods`` or all."""
    counts, lock = {"asked": 0, "refused": 0}, threading.Lock()
    host = urlsplit(server).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.sent()
            with lock:
                meant = not methods or self.command in methods
                counts["asked"] += meant
                refused = meant and refuses(counts["asked"])
                counts["refused"] += refused
            if refused:
                return self.send(answer[0], {"Content-Type": "application/xml"}, answer[1])
            behind = HTTPConnection(host, timeout=60)
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # signed for the host that was asked
                if name.lower() != "expect":
                    behind.putheader(name, value)
            behind.endheaders(body)
            given = behind.getresponse()
            return self.send(given.status, dict(given.getheaders()), given.read())

        def sent(self) -> bytes:
            """The body as it came: of a known length, or in chunks."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            lines = [self.rfile.readline()]
            while size := int(lines[-1].split(b";")[0], 16):
                lines += [self.rfile.read(size + 2), self.rfile.readline()]
            while lines[-1] != b"\r\n":
                lines.append(self.rfile.readline())
            return b"".join(lines)

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection") and (
                    name.lower() != "content-length" or self.command == "HEAD"
                ):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_) -> None:
            """Nothing is logged."""

    class Proxy(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_) -> None:
            """A client that has gone is no error of the tests."""

    proxy = Proxy(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", counts
    finally:
        proxy.shutdown()
        proxy.server_close()


#: Python reads this file when it starts. ``FFT_FAULTS`` names a folder: of all processes of a test, the first that
#: finishes a part fails when it is there, the second is killed, the third is told that the store is busy.
#: With ``FFT_STALLS`` so many parts of a table are finished, and no other one ever is.
#: ``FFT_REFUSES`` says below which folder a mounted store begins.
STARTS = """
import builtins, errno, os, time

stalls = os.environ.get("FFT_STALLS")
faults, refuses = os.environ.get("FFT_FAULTS"), os.environ.get("FFT_REFUSES")

if stalls:
    import zlib

    from fft.data import part_files

    finish = part_files.PartFile.finish

    def finishing(self, *given):
        table = zlib.crc32(str(self._target.folder).encode())
        for ticket in range(int(stalls)):  # counting what is finished would let through all who count at once
            try:
                os.close(os.open(f"{os.path.dirname(__file__)}/{table}-{ticket}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return finish(self, *given)
        while True:
            time.sleep(0.1)

    part_files.PartFile.finish = finishing

if faults:
    from fft.data import asking

    close = asking.NewFile.close

    def closing(self):
        for how in ("raise", "kill", "busy") if self._path.endswith(".parquet") else ():
            try:
                os.close(os.open(f"{faults}/{how}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            if how == "kill":
                os._exit(9)
            if how == "busy":
                raise OSError("AWS Error SLOW_DOWN during CompleteMultipartUpload operation: reduce your rate")
            close(self)
            raise RuntimeError("a task fails after it has written")
        return close(self)

    asking.NewFile.close = closing

if refuses:
    def refuse():
        raise OSError(errno.ENOTSUP, "Operation not supported")

    def here(*paths):
        return any(isinstance(path, str | os.PathLike) and os.fspath(path).startswith(refuses) for path in paths)

    def guarded(own, wrong):
        def call(*given, **named):
            return refuse() if here(*given[:2]) and wrong(*given) else own(*given, **named)
        return call

    os.open = guarded(os.open, lambda path, flags, *_: flags & (os.O_RDWR | os.O_APPEND))
    os.supports_dir_fd.add(os.open)  # as shutil asks
    for name in ("link", "rename", "replace"):
        setattr(os, name, guarded(getattr(os, name), lambda *_: True))
    builtins.open = guarded(open, lambda path, mode="r", *_: "a" in mode or "+" in mode)
"""


def with_faults(folder: Path, **faults: str) -> dict[str, str]:
    """The environment of a job whose processes read :data:`STARTS` first."""
    (folder / "starts").mkdir(exist_ok=True)
    (folder / "starts" / "sitecustomize.py").write_text(STARTS)
    root = Path(__file__).resolve().parent.parent
    return faults | {"PYTHONPATH": os.pathsep.join((str(folder / "starts"), str(root)))}
