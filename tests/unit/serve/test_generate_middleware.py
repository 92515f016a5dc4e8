"""POST /generate and what stands before vLLM's routes, around a stub of these routes."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from stub_chat import StubChat, ask

from fft.serve import middleware
from fft.serve.middleware import API_KEYS, SHUTDOWN_TIMEOUT, Generate
from fft.serve.translate import StreamTranslator

HI = {"messages": [{"user": "Hi"}]}


@pytest.fixture
def keyed(monkeypatch):
    monkeypatch.setenv(API_KEYS, json.dumps(["sekret", "schlüssel"]))


def test_a_conversation_becomes_a_chat_and_its_answer_a_text():
    stub = StubChat("Hello.")
    asked = {
        "messages": [{"system": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
        "sampling": {"max_tokens": 32, "temperature": 0, "stop": "x", "seed": None},
        "model": "poet",
    }
    reply = ask(Generate(stub), asked)
    assert reply.status == 200
    assert reply.json == {"text": ["Hello."], "finish_reason": ["stop"], "usage": {"completion_tokens": 3}}
    assert reply.headers == {
        "content-type": "application/json",
        "content-length": str(len(reply.body)),
        "x-request-id": "17",
    }
    assert stub.asked == [
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
            "model": "poet",
            "max_tokens": 32,
            "temperature": 0,
            "stop": "x",
        }
    ]
    scope = stub.seen[0]
    assert (scope["path"], scope["raw_path"]) == ("/v1/chat/completions", b"/v1/chat/completions")


def test_a_prompt_is_gone_on_with_as_it_is():
    stub = StubChat(" city.")
    reply = ask(Generate(stub), {"prompt": "San Francisco is a", "response_format": {"type": "json_object"}})
    assert reply.json["text"] == [" city."]
    assert stub.asked == [
        {"prompt": "San Francisco is a", "response_format": {"type": "json_object"}, "max_tokens": None}
    ]
    assert stub.seen[0]["path"] == "/v1/completions"


def test_the_last_turn_is_gone_on_with_where_it_is_the_assistants():
    stub = StubChat()
    ask(Generate(stub), {"messages": [{"user": "Hi"}, {"assistant": "He"}]})
    assert stub.asked[0]["continue_final_message"] is True
    assert stub.asked[0]["add_generation_prompt"] is False


def test_tools_and_pictures_reach_the_model_and_calls_come_back():
    stub = StubChat("")
    stub.extra = {"content": None, "tool_calls": [{"id": "1"}], "reasoning": "Hm."}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "0", "type": "function"}]}
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        call,
        {"role": "tool", "content": "7", "tool_call_id": "0"},
    ]
    reply = ask(Generate(stub), {"messages": turns, "tools": [{"type": "function"}]})
    del call["content"]  # null is as if it were not there
    assert stub.asked[0]["messages"] == turns
    assert stub.asked[0]["tools"] == [{"type": "function"}]
    assert reply.json["text"] == [""]
    assert reply.json["tool_calls"] == [[{"id": "1"}]]
    assert reply.json["reasoning"] == ["Hm."]


def test_several_choices_keep_their_order():
    assert ask(Generate(StubChat("a", "b", "c")), HI | {"sampling": {"n": 3}}).json["text"] == ["a", "b", "c"]


@pytest.mark.parametrize("given", ["chat", "completion"])
def test_log_probabilities_have_one_form(given):
    stub, told = StubChat("ab"), {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -0.7}]}
    if given == "chat":
        stub.extra, asked = {}, HI | {"sampling": {"logprobs": 1}}
        logprobs = {"content": [told | {"bytes": [97], "top_logprobs": [{"token": "b", "logprob": -0.7, "bytes": []}]}]}
    else:
        asked = {"prompt": "x", "sampling": {"logprobs": 1}}
        logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.7}], "text_offset": [0]}
    choice = stub.choice
    stub.choice = lambda *given: choice(*given) | {"logprobs": logprobs}
    assert ask(Generate(stub), asked).json["logprobs"] == [[told]]
    wanted = {"logprobs": True, "top_logprobs": 1} if given == "chat" else {"logprobs": 1}
    assert {name: stub.asked[0].get(name) for name in wanted} == wanted


@pytest.mark.parametrize("cut", [1, 3, 50, 10_000])
def test_a_stream_tells_pieces_wherever_it_is_cut(cut):
    stub = StubChat("Grüße aus 東京, all", cut=cut)
    reply = ask(Generate(stub), HI | {"stream": True})
    assert stub.asked[0]["stream_options"] == {"include_usage": True}
    assert reply.headers["content-type"].startswith("text/event-stream")
    keep_alive, *pieces, usage, done = reply.events
    assert (keep_alive, done) == (": keep-alive", "[DONE]")
    assert "".join(piece["text"][0] for piece in pieces) == "Grüße aus 東京, all"
    assert [piece["finish_reason"] for piece in pieces] == [[None]] * 4 + [["stop"]]
    assert usage == {"text": [], "finish_reason": [], "usage": {"completion_tokens": 3}}


def test_a_stream_of_several_choices_says_whose_a_piece_is():
    stub = StubChat("a b", "c d")
    pieces = [event for event in ask(Generate(stub), HI | {"stream": True, "sampling": {"n": 2}}).events[1:-2]]
    texts = ["", ""]
    for piece in pieces:
        texts[piece["index"][0]] += piece["text"][0]
    assert texts == ["a b", "c d"]


def test_an_answer_that_was_cut_off_is_503_and_in_a_stream_an_error():
    reply = ask(Generate(StubChat("He", finish="abort")), HI)
    assert (reply.status, reply.headers["retry-after"]) == (503, "30")
    assert "stopped before the answer was complete" in reply.json["error"]["message"]
    *_, piece, error, _, done = ask(Generate(StubChat("He", finish="abort")), HI | {"stream": True}).events
    assert (piece["finish_reason"], error["error"]["code"], done) == (["abort"], 503, "[DONE]")


REFUSED = {
    b"": "The body is not valid JSON: Expecting value",
    b"{": "The body is not valid JSON",
    b"\xff": "The body is not valid UTF-8 at byte 0",
    b"[1]": "The body is list, not a JSON object",
    b"{}": 'Give either "messages", a list of turns, or "prompt", a text',
    b'{"messages": [{"user": "a"}], "prompt": "b"}': 'Give either "messages"',
    b'{"message": []}': "Unknown key 'message' (did you mean messages?); known are messages, prompt, sampling, stream",
    b'{"messages": []}': '"messages" must be a list of turns that is not empty',
    b'{"messages": "Hi"}': '"messages" must be a list of turns',
    b'{"messages": ["Hi"]}': '"messages": turn 1 is str, not an object',
    b'{"messages": [{"user": "a", "assistant": "b"}]}': '"messages": turn 1 must have one role as its key',
    b'{"messages": [{"user": "a"}, {"usr": "b"}]}': "\"messages\": turn 2 has the unknown role 'usr'",
    b'{"messages": [{"role": ["user"], "content": "b"}]}': '"messages": turn 1 has the unknown role',
    b'{"messages": [{"user": 5}]}': '"messages": the content of turn 1 must be a string or a list of parts',
    b'{"messages": [{"role": "user"}]}': '"messages": the content of turn 1 must be',
    b'{"messages": [{"user": ["<image>"]}]}': '"messages": turn 1 has 1 <image> and 0 images',
    b'{"messages": [{"user": ["<image>", "a.png"]}]}': "an image of turn 1 is no URL: give its bytes as a data: URL",
    b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}': "turn 1 has the unknown key 'weight'",
    b'{"prompt": "a", "tools": [{}]}': '"tools" go with "messages"',
    b'{"prompt": ["a"]}': '"prompt" must be a string',
    b'{"prompt": "a", "stream": 1}': '"stream" must be true or false',
    b'{"prompt": "a", "model": 1}': '"model" must be a string',
    b'{"prompt": "a", "sampling": [1]}': '"sampling" must be an object',
    b'{"prompt": "a", "response_format": "json"}': '"response_format" must be an object',
    b'{"messages": [{"user": "a"}], "tools": {}}': '"tools" must be a list of objects',
    b'{"prompt": "a", "sampling": {"max_token": 3}}': (
        "Unknown key 'sampling.max_token' (did you mean max_tokens?); known are n, temperature"
    ),
    b'{"prompt": "a", "sampling": {"output_kind": 1, "detokenize": false}}': (
        "Unknown keys 'sampling.output_kind', 'sampling.detokenize'; known"
    ),
    b'{"prompt": "a", "sampling": {"temperature": "hot"}}': '"sampling.temperature" must be a number',
    b'{"prompt": "a", "sampling": {"temperature": true}}': '"sampling.temperature" must be a number',
    b'{"prompt": "a", "sampling": {"max_tokens": 1.5}}': '"sampling.max_tokens" must be an integer',
    b'{"prompt": "a", "sampling": {"stop": [1]}}': '"sampling.stop" must be a string or a list of strings',
    b'{"prompt": "a", "sampling": {"stop_token_ids": ["a"]}}': '"sampling.stop_token_ids" must be a list of integers',
    b'{"prompt": "a", "sampling": {"ignore_eos": 1}}': '"sampling.ignore_eos" must be true or false',
    b'{"prompt": "a", "sampling": {"logprobs": true}}': '"sampling.logprobs" must be an integer',
    b'{"prompt": "a", "sampling": {"temperature": NaN}}': "The body holds a number that is none",
    b'{"prompt": "\\ud800"}': "The body holds a lone surrogate",
    b"[" * 100_000: "The body is not valid JSON",
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body[:60].decode("latin-1"))
def test_what_is_not_understood_is_refused_in_one_sentence(body):
    stub = StubChat()
    reply = ask(Generate(stub), body)
    error = reply.json["error"]
    assert (reply.status, error["type"], error["code"]) == (400, "BadRequestError", 400)
    assert REFUSED[body] in error["message"]
    assert "\n" not in error["message"]
    assert not stub.asked


def test_a_text_and_its_images_become_parts():
    stub = StubChat()
    body = {"messages": [{"user": ["<image>a <image>", "data:x", "https://y"]}, {"assistant": "b"}, {"user": ["c"]}]}
    assert ask(Generate(stub), body).status == 200
    images = [{"type": "image_url", "image_url": {"url": url}} for url in ("data:x", "https://y")]
    contents = [[images[0], {"type": "text", "text": "a "}, images[1]], "b", [{"type": "text", "text": "c"}]]
    assert [message["content"] for message in stub.asked[0]["messages"]] == contents


def test_other_methods_and_types_are_refused():
    assert ask(Generate(StubChat()), method="GET").status == 405
    assert ask(Generate(StubChat()), method="GET").headers["allow"] == "POST"
    reply = ask(Generate(StubChat()), HI, headers={"content-type": "text/plain"})
    assert (reply.status, reply.json["error"]["code"]) == (415, 415)
    assert ask(Generate(StubChat()), HI, headers={"content-type": "Application/JSON; charset=utf-8"}).status == 200


def test_long_bodies_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(middleware, "_MOST_BYTES", 1000)
    stub = StubChat()
    long = {"prompt": "a" * 1000}
    assert ask(Generate(stub), long).status == 413
    assert ask(Generate(stub), pieces=[b"a" * 600, b"a" * 600, b"a"]).status == 413  # nobody said how long
    assert ask(Generate(stub), long, path="/v1/completions").status == 413
    assert ask(Generate(stub), {"prompt": "a" * 900}).status == 200
    assert len(stub.asked) == 1


def test_a_body_may_come_in_pieces():
    body = json.dumps(HI).encode()
    assert ask(Generate(StubChat()), pieces=[body[:5], b"", body[5:]]).json["text"] == ["Hello."]


def test_a_client_that_is_gone_before_its_body_is_not_answered():
    sent, stub = [], StubChat()

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(Generate(stub)(scope, receive, send))
    assert not sent
    assert not stub.seen


def test_an_error_in_a_stream_passes_unless_the_server_stops():
    event = b'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n'
    assert StreamTranslator(False).feed(event, True) == event
    told = StreamTranslator(False).feed(event, True, stopping=True)
    assert b"stopped before the answer was complete" in told
    assert b"503" in told


def test_errors_of_vllm_pass_in_one_line():
    stub = StubChat()
    stub.error = (404, {"error": {"message": "1 error:\n  no such model", "code": 404}})
    reply = ask(Generate(stub), HI)
    assert (reply.status, reply.json) == (404, {"error": {"message": "1 error: no such model", "code": 404}})
    stub.error = (502, b"Bad gateway")
    reply = ask(Generate(stub), HI | {"stream": True})
    assert (reply.status, reply.body) == (502, b"Bad gateway")
    stub.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        ask(Generate(stub), HI)


def test_behind_a_proxy_the_prefix_stays():
    for path, target in (("/api/generate", "/api/v1/chat/completions"), ("/generate", "/v1/chat/completions")):
        stub = StubChat()
        assert ask(Generate(stub), HI, path=path, root_path="/api").status == 200
        assert stub.seen[0]["path"] == target


OPEN = ["/", "/health"]
GUARDED = [
    "/generate",
    "/v1/models",
    "/v1/chat/completions",
    "/metrics",
    "/invocations",
    "/ping",
    "/docs",
    "//",
    "/health/",
]


@pytest.mark.parametrize("path", OPEN + GUARDED)
def test_every_route_needs_a_key_but_the_page_and_health(path, keyed):
    app, method = Generate(StubChat()), "GET" if path in OPEN or "models" in path else "POST"
    for given in (None, "Bearer", "Bearer wrong", "Basic sekret", "sekret"):
        reply = ask(app, HI, path=path, method=method, headers={"authorization": given} if given else {})
        assert reply.status == (200 if path in OPEN else 401), given
        if path in GUARDED:
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer KEY" in reply.json["error"]["message"]
    for key in ("Bearer sekret", "bearer sekret"):
        assert ask(app, HI, path=path, method=method, headers={"authorization": key}).status in (200, 404)


def test_without_keys_every_route_is_open(monkeypatch):
    monkeypatch.delenv(API_KEYS, raising=False)
    assert ask(Generate(StubChat()), HI).status == 200
    assert ask(Generate(StubChat()), path="/metrics", method="GET").status == 200


def test_what_a_browser_asks_before_it_asks_needs_no_key(keyed):
    stub = StubChat()
    ask(Generate(stub), method="OPTIONS")
    assert stub.seen[0]["path"] == "/generate"


def test_a_websocket_needs_a_key(keyed):
    stub, sent = StubChat(), []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(Generate(stub)(scope, None, send))
    assert (sent[0]["type"], sent[0]["code"]) == ("websocket.close", 1008)
    asyncio.run(Generate(stub)(scope | {"headers": [(b"authorization", b"Bearer sekret")]}, None, send))
    assert len(stub.seen) == 1


def test_the_page_runs_its_own_script_and_nothing_else():
    reply = ask(Generate(StubChat()), path="/", method="GET")
    policy = reply.headers["content-security-policy"]
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    page = reply.body.decode()
    assert "http://" not in page
    assert "https://" not in page
    assert "innerHTML" not in page
    assert ask(Generate(StubChat()), path="/", method="HEAD").body == b""


DRAIN = """
import asyncio, json, os, signal, sys
sys.path.insert(0, "tests")
from stub_chat import StubChat
from fft.serve.middleware import Generate

async def main():
    told = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.append, "vLLM was told")
    stub = StubChat("a b c")
    stub.pause = 0.05
    app = Generate(stub)
    await app({"type": "lifespan"}, None, None)

    async def request(path, body=b"{}", method="POST"):
        sent, bodies = [], [{"type": "http.request", "body": body}]
        async def receive():
            return bodies.pop() if bodies else await asyncio.sleep(60)
        async def send(message):
            sent.append(message)
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", b"application/json")]}
        await app(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:]).decode()

    body = json.dumps({"messages": [{"user": "Hi"}], "stream": True}).encode()
    before = asyncio.create_task(request("/generate", body))
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.02)
    for path, method in (("/generate", "POST"), ("/v1/models", "GET"), ("/health", "GET"), ("/metrics", "GET")):
        status, headers, answer = await request(path, body, method)
        print(path, status, headers.get(b"retry-after"), answer[:60])
    print(told, (await before)[2].count('"text"'))
    stub.error = RuntimeError("cannot schedule new futures after shutdown")
    app._draining = False
    late = asyncio.create_task(request("/generate", body))
    await asyncio.sleep(0)
    app._draining = True
    print((await late)[0])

asyncio.run(main())
"""


def test_after_sigterm_new_requests_are_refused_and_those_in_flight_complete():
    run = subprocess.run([sys.executable, "-c", DRAIN], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    refused = 'b\'30\' {"error": {"message": "The server is being stopped and takes'
    assert run.stdout.splitlines() == [
        f"/generate 503 {refused}",
        f"/v1/models 503 {refused}",
        f"/health 503 {refused}",
        "/metrics 200 None vllm:num_requests_running 0.0",
        "",
        "['vLLM was told'] 5",
        "503",
    ]


GIVEN_UP = """
import asyncio, json, os, signal, sys, time
sys.path.insert(0, "tests")
from stub_chat import StubChat
from fft.serve import middleware

async def main():
    middleware._GRACE = 0.2
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print, "vLLM was told")
    stub = StubChat("never")
    stub.pause = 60
    app = middleware.Generate(stub)
    await app({"type": "lifespan"}, None, None)

    async def request(path, stream, pieces):
        sent = []
        async def receive():
            return pieces.pop(0) if pieces else await asyncio.sleep(60)
        async def send(message):
            sent.append(message)
        scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
        scope["headers"].append((b"content-length", b"%d" % len(body(stream))))
        await app(scope, receive, send)
        last = sent[-1]
        return sent[0]["status"], last["type"], last.get("more_body"), last.get("body", b"")[:40]

    def body(stream):
        return json.dumps({"messages": [{"user": "Hi"}], "stream": stream}).encode()

    waiting = []
    for path in ("/generate", "/v1/chat/completions"):
        for stream in (False, True):
            waiting.append(request(path, stream, [{"type": "http.request", "body": body(stream)}]))
    waiting.append(request("/generate", False, []))  # its body does not come
    tasks = [asyncio.create_task(one) for one in waiting]
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    begun = time.monotonic()
    for told in await asyncio.gather(*tasks):
        print(*told)
    print(time.monotonic() - begun < 5, len(app._deadlines))

asyncio.run(main())
"""


def test_what_vllm_lets_wait_for_good_is_given_up():
    environment = {**os.environ, SHUTDOWN_TIMEOUT: "0.1"}
    run = subprocess.run([sys.executable, "-c", GIVEN_UP], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    refused = """503 http.response.body None b'{"error": {"message": "The server was st'"""
    assert run.stdout.splitlines() == [
        "vLLM was told",
        refused,
        """200 http.response.body False b'data: {"error": {"message": "The server '""",
        refused,
        "200 http.response.start None b''",  # the client sees that it breaks off
        refused,
        "True 0",
    ]


def test_what_vllm_tells_clients_that_are_gone_is_no_fault():
    stub = StubChat()
    stub.error = (200, b"null")
    assert ask(Generate(stub), HI).body == b"null"


def test_a_process_that_has_no_handler_still_ends():
    code = "import asyncio\nfrom fft.serve.middleware import Generate\n"
    code += "async def app(*_): pass\nasyncio.run(Generate(app)({'type': 'lifespan'}, None, None))\n"
    code += "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(600)"
    run = subprocess.run([sys.executable, "-c", code], timeout=300, env=os.environ)
    assert run.returncode == -signal.SIGTERM
