"""A store between tests and their object store, which is busy, slow or refuses when it is told to."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: Bodies of answers, as S3 words them.
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
BUSY, EXPIRED = (503, "SlowDown"), (400, "ExpiredToken")


class Proxy:
    """Its address is ``url``; ``rule`` gets method and path and returns None, an answer, or seconds to wait first."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.rule: Callable[[str, str], tuple[int, str] | float | None] = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.refused = 0
        self.url = ""


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """A proxy in front of the store at ``target``."""
    proxy = Proxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def body(self):
            """As it comes: of one in chunks their sizes, too."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            while size := self.rfile.readline():
                yield size
                if not int(size.split(b";")[0], 16):
                    break
                yield self.rfile.read(int(size.split(b";")[0], 16) + 2)
            while (line := self.rfile.readline()) not in (b"", b"\r\n"):
                yield line
            yield b"\r\n"

        def answer(self):
            body = b"".join(self.body())
            proxy.asked.append((self.command, self.path))
            ruled = proxy.rule(self.command, self.path)
            if isinstance(ruled, tuple):
                proxy.refused += 1
                self.reply(ruled[0], [], _ERROR.format(code=ruled[1]).encode())
                return
            time.sleep(ruled or 0)
            onward = http.client.HTTPConnection(proxy.target, timeout=60)
            onward.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    onward.putheader(name, value)
            onward.endheaders(body)
            got = onward.getresponse()
            self.reply(got.status, got.getheaders(), got.read(), got.getheader("Content-Length"))
            onward.close()

        def reply(self, status, headers, body, length=None):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            # Of a HEAD the length is that of what a GET would bring.
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()
