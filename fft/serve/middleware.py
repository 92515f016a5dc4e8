"""What stands before vLLM's routes: ``POST /generate``, a page to chat with, the API key on every route, and 503 while
the server drains. Pure ASGI, for ``vllm serve --middleware fft.serve.middleware.Generate``; knows nothing of vLLM but
its public HTTP routes.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from fft.json_text import json_value
from fft.serve.translate import (
    ABORTED,
    Refused,
    StreamTranslator,
    VllmRequest,
    error_body,
    error_event,
    is_aborted,
    read_generate_request,
    told_answer,
    told_error,
)

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Asgi = Callable[[_Message, _Receive, _Send], Awaitable[None]]
_Headers = list[tuple[bytes, bytes]]
_T = TypeVar("_T")
_Handler = Callable[[int, FrameType | None], Any]

#: The environment variable with the keys that are accepted, a JSON list; without it, none is needed.
API_KEYS = "FFT_SERVE_API_KEYS"
#: And the one with the seconds that vLLM gives answers to be completed, once it is told to stop.
SHUTDOWN_TIMEOUT = "FFT_SERVE_SHUTDOWN_TIMEOUT"
PAGE = Path(__file__).with_name("page.html")
#: Bytes of a request's body, at most.
_MOST_BYTES = 64 << 20
#: Routes that need no key: the page, which holds no data, and what an orchestrator asks. And one that is still answered
#: while the server drains.
_OPEN, _WHILE_DRAINING = ("/", "/health"), ("/metrics",)
#: Seconds after which a client may try again while the server drains.
_RETRY_AFTER = 30
#: Seconds after vLLM's end of patience at which nothing comes any more: it kills its engine, and lets requests wait.
_GRACE = 2.0


class Generate:
    """The middleware around ``app``. Outermost, so that a rewritten request passes all that vLLM does to its own."""

    def __init__(self, app: _Asgi) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in json.loads(os.environ.get(API_KEYS) or "[]")]
        self._page = PAGE.read_bytes()
        self._page_headers = _page_headers(self._page)
        self._draining = False
        self._patience = float(os.environ.get(SHUTDOWN_TIMEOUT) or "inf") + _GRACE
        #: When requests under way are given up, by the event loop's clock; and what watches over each.
        self._end: float | None = None
        self._loop: asyncio.AbstractEventLoop
        self._deadlines: set[asyncio.Timeout] = set()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """See https://asgi.readthedocs.io/en/latest/specs/main.html."""
        if scope["type"] == "lifespan":
            self._watch_signals()
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        route = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            self._admit(scope, route)
            method = scope.get("method")  # of a websocket there is none; OPTIONS is what a browser asks before it asks
            if route == "/generate" and method not in (None, "OPTIONS"):
                await self._generate(scope, receive, send)
            elif route == "/" and method in ("GET", "HEAD"):
                await _reply(send, 200, self._page if method == "GET" else b"", self._page_headers)
            else:
                await self._pass(scope, receive, send)
        except Refused as refused:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(refused)[:120]})
            else:
                await _reply_json(send, refused.status, error_body(refused.status, str(refused)))

    def _admit(self, scope: _Message, route: str) -> None:
        """Raise :class:`Refused` for what is not to be answered, whatever it asks."""
        if self._draining and route not in _WHILE_DRAINING:
            raise Refused(503, "The server is being stopped and takes no new requests: ask again later.")
        headers = dict(scope["headers"])
        if scope.get("method") != "OPTIONS" and route not in _OPEN and not self._has_key(headers):
            raise Refused(401, "The API key is missing or wrong: send it as the header Authorization: Bearer KEY.")
        if _length(headers) > _MOST_BYTES:
            raise _too_long()

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(key)
        known = [hmac.compare_digest(digest, one) for one in self._keys]  # all of them: time tells nothing
        return not self._keys or (scheme.lower() == b"bearer" and any(known))

    async def _generate(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["method"] != "POST":
            return await _reply_json(
                send, 405, error_body(405, "/generate takes POST, with a body of JSON."), [(b"allow", b"POST")]
            )
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # a browser asks before it sends that to another site
            raise Refused(415, "/generate takes JSON: send the header Content-Type: application/json.")
        body = await self._while_alive(_read(receive))
        if body is None:
            return None
        request = read_generate_request(body)
        answer = _Answer(send, request.many, lambda: self._draining)
        try:
            await self._while_alive(self._app(*_rewritten(scope, receive, request), answer.send))
        except Refused as refused:
            if not answer.started:
                raise
            return await answer.cut_off(refused)
        except Exception as error:
            if answer.started or not self._draining:
                raise
            raise Refused(*ABORTED) from error
        if not answer.started and answer.status is not None:
            await answer.finish()

    async def _pass(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Let vLLM answer. A response that it has begun and cannot complete breaks off, as its client will see."""
        started = False

        async def passed(message: _Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._while_alive(self._app(scope, receive, passed))
        except Refused:
            if not started:
                raise

    async def _while_alive(self, work: Awaitable[_T]) -> _T:
        """What comes of a request's work. Raises :class:`Refused` when nothing will, as vLLM's engine has ended."""
        deadline = asyncio.timeout_at(self._end)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                return await work
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise Refused(*ABORTED) from error
        finally:
            self._deadlines.discard(deadline)

    def _watch_signals(self) -> None:
        """Know when vLLM is told to stop. Its own handlers, which the event loop calls, go on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, self._draining_before(before))
                signal.siginterrupt(number, False)

    def _draining_before(self, before: _Handler) -> _Handler:
        def handler(number: int, frame: FrameType | None) -> None:
            if not self._draining:
                self._draining = True
                self._loop.call_soon_threadsafe(self._set_end)
            before(number, frame)

        return handler

    def _set_end(self) -> None:
        self._end = self._loop.time() + self._patience
        for deadline in self._deadlines:
            deadline.reschedule(self._end)


class _Answer:
    """Takes vLLM's answer to a request, and sends what ``/generate`` makes of it."""

    def __init__(self, send: _Send, many: bool, stopping: Callable[[], bool]) -> None:
        self._send, self._many, self._stopping = send, many, stopping
        self._stream: StreamTranslator | None = None
        self._headers: _Headers = []
        self._whole = b""
        self.status: int | None = None
        #: Whether anything was sent.
        self.started = False

    async def send(self, message: _Message) -> None:
        """What vLLM calls to answer."""
        if message["type"] == "http.response.start":
            self.status, self._headers = message["status"], list(message.get("headers", ()))
            if dict(self._headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                self._stream, self.started = StreamTranslator(self._many), True
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._stream is None:
            self._whole += message.get("body", b"")
        else:
            more = message.get("more_body", False)
            events = self._stream.feed(message.get("body", b""), not more, self._stopping())
            if events or not more:
                await self._send({"type": "http.response.body", "body": events, "more_body": more})

    async def finish(self) -> None:
        """Send an answer that came whole. Raises :class:`Refused` for one that the server's end has cut off."""
        status = self.status or 500
        if status >= 500 and self._stopping():
            raise Refused(*ABORTED)
        kept = [pair for pair in self._headers if pair[0] != b"content-length"]
        if status != 200:
            return await _reply(self._send, status, told_error(self._whole), kept)
        chat = json_value(self._whole)
        if not chat:  # what vLLM tells a client that is gone
            return await _reply(self._send, status, self._whole, kept)
        told = told_answer(chat)
        if is_aborted(told):
            raise Refused(*ABORTED)
        await _reply_json(self._send, status, told, [pair for pair in kept if pair[0] != b"content-type"])

    async def cut_off(self, refused: Refused) -> None:
        """End a stream that will not be completed."""
        event = error_event(refused.status, str(refused))
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _rewritten(scope: _Message, receive: _Receive, request: VllmRequest) -> tuple[_Message, _Receive]:
    """The request that asks vLLM; its body comes once, then what the client does."""
    replaced = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [pair for pair in scope["headers"] if pair[0] not in replaced]
    headers += [(b"content-length", str(len(request.body)).encode()), (b"content-type", b"application/json")]
    path = scope["path"].removesuffix("/generate") + request.route
    bodies = [request.body]

    async def receive_body() -> _Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}, receive_body


async def _read(receive: _Receive) -> bytes | None:
    """A request's body; None where the client is gone. Raises :class:`Refused` for one that is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > _MOST_BYTES:
            raise _too_long()
        if not message.get("more_body"):
            return bytes(body)


def _too_long() -> Refused:
    return Refused(413, f"The body is longer than {_MOST_BYTES >> 20} MiB.")


def _length(headers: dict[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() else 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _page_headers(page: bytes) -> _Headers:
    """Headers that let a browser run the page's own script and style, and nothing else."""

    def hashes(tag: bytes) -> str:
        contents = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(_digest(content)).decode()}'" for content in contents)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]


async def _reply_json(send: _Send, status: int, payload: object, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    added: _Headers = [(b"content-type", b"application/json")]
    if status == 401:
        added.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        added.append((b"retry-after", str(_RETRY_AFTER).encode()))
    await _reply(send, status, json.dumps(payload, ensure_ascii=False).encode(), [*headers, *added])


async def _reply(send: _Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
