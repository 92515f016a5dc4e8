"""vLLM's OpenAI routes as a few lines of ASGI that answer what a test tells them to, and a client for such apps."""

import asyncio
import json


class StubChat:
    """Answers chats and completions with ``texts``, one a choice; ``asked`` has the bodies that came.

    A stream is sent in pieces of ``cut`` bytes. ``error`` is (status, payload), or an exception to raise.
    """

    def __init__(self, *texts: str, finish: str = "stop", cut: int = 7) -> None:
        self.texts, self.finish, self.cut = list(texts) or ["Hello."], finish, cut
        self.asked: list[dict] = []
        self.seen: list[dict] = []
        self.error: tuple[int, object] | Exception | None = None
        self.extra: dict = {}
        self.pause = 0.0
        self.messages: list[dict] = []

    async def __call__(self, scope, receive, send):
        self.seen.append(scope)
        if scope["type"] != "http":
            return
        route = scope["path"].removeprefix(scope.get("root_path", ""))
        if route not in ("/v1/chat/completions", "/v1/completions"):
            known = {"/health": b"", "/metrics": b"vllm:num_requests_running 0.0\n", "/v1/models": self.models()}
            return await respond(send, 200 if route in known else 404, known.get(route, b"{}"))
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked.append(json.loads(body))
        assert len(body) == int(dict(scope["headers"])[b"content-length"])
        if not self.asked[-1].get("stream") or self.error:
            await asyncio.sleep(self.pause)
        if isinstance(self.error, Exception):
            raise self.error
        if self.error:
            status, payload = self.error
            return await respond(send, status, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
        chat = "chat" in route
        if self.asked[-1].get("stream"):
            await self.stream(chat, send)
        else:
            choices = [self.choice(chat, "message", at, text, self.finish) for at, text in enumerate(self.texts)]
            reply = {"choices": choices[::-1], "usage": {"completion_tokens": 3}}
            await respond(send, 200, json.dumps(reply).encode(), [(b"x-request-id", b"17")])

    def models(self) -> bytes:
        return json.dumps({"data": [{"id": "models/base"}, {"id": "poet"}]}).encode()

    def choice(self, chat: bool, part: str, index: int, text: str, finish: str | None) -> dict:
        content = {part: {"role": "assistant", "content": text} | self.extra} if chat else {"text": text}
        return {"index": index, **content, "finish_reason": finish, "logprobs": None}

    async def stream(self, chat, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events = [b": keep-alive\n\n"]
        for at, text in enumerate(self.texts):
            words = [word + " " for word in text.split(" ")]
            words[-1] = words[-1][:-1]
            pieces = [("", None), *((word, None) for word in words), ("", self.finish)]
            events += [chunk_event([self.choice(chat, "delta", at, *piece)]) for piece in pieces]
        events += [chunk_event([], usage={"completion_tokens": 3}), b"data: [DONE]\n\n"]
        for event in events if self.pause else [b"".join(events)]:
            await asyncio.sleep(self.pause)
            for at in range(0, len(event), self.cut):
                await send({"type": "http.response.body", "body": event[at : at + self.cut], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def chunk_event(choices: list[dict], **more: object) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": choices, **more}).encode() + b"\n\n"


async def respond(send, status: int, body: bytes, headers=()):
    headers = [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Reply:
    """What an app sent: status, headers by name, body, and the JSON in it."""

    def __init__(self, messages: list[dict]) -> None:
        start = messages[0]
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self) -> list:
        """Server-sent events: their JSON, or their text where they hold none."""
        found = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        return [json.loads(event) if event.startswith(b"{") else event.decode() for event in found]


def ask(app, body=None, *, path="/generate", method="POST", headers=None, root_path="", pieces=None) -> Reply:
    """Send one request to an ASGI app. ``body`` is bytes, or what is sent as JSON; ``pieces`` are bodies in pieces."""
    body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(body))} if pieces is None else {}
    given |= {"content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items() if value is not None],
    }
    pieces = list(pieces or [body])
    incoming = [
        {"type": "http.request", "body": piece, "more_body": at < len(pieces) - 1} for at, piece in enumerate(pieces)
    ]
    sent: list[dict] = []

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return Reply(sent)
