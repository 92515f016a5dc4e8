"""`python -m fft.serve.server` with a real vLLM behind it, asked over real sockets."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from browser import CHROMIUM, browser
from ports import free_port
from transformers import LlamaConfig, LlamaForCausalLM

from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve.engines import EngineOptions
from fft.serve.engines.choice import load_engine
from fft.serve.prompts import Renderer, load_model_tokenizer
from fft.serve.sampling import Sampling
from fft.serve.window import Question, answers

ROOT = Path(__file__).parents[2]
PROMPTS = ["San Francisco is a", "def f(x):", "import", "x", "for i in range(", "class A:\n    def g(self"]
#: Of the environment that trains; `make env` makes it.
TRAINER = Path(os.environ.get("FFT_TRAIN_PYTHON", ROOT / ".venv" / "bin" / "python"))
POSITIONS = 16384
#: Seconds after which what is waited for does not come any more: many, for a machine that has much else to do.
PATIENCE = 300


class Server:
    """A running server, and requests to it."""

    def __init__(self, log: Path, *arguments: object, key: str | None = None) -> None:
        self.port, self.log = free_port(), log
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        command = [sys.executable, "-m", "fft.serve.server", "--port", self.port, *arguments, "--enforce-eager"]
        with open(log, "w") as stream:
            self.process = psutil.Popen(
                [*map(str, command), "--kv-cache-memory-bytes", "64M"],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        while self.status("/health") != 200:
            assert self.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def request(self, path: str, body: object = None, method: str | None = None, **headers: str):
        """The response to one request, still to be read, and its connection."""
        connection = self.connection()
        sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **self.headers, **headers}
        connection.request(method or ("GET" if body is None else "POST"), path, sent, given)
        return connection.getresponse(), connection

    def status(self, path: str, body: object = None, method: str | None = None, **headers: str) -> int:
        with contextlib.suppress(ConnectionError):
            return self.request(path, body, method, **headers)[0].status
        return 0

    def generate(self, body: dict) -> dict:
        """What /generate answers."""
        response, _ = self.request("/generate", body)
        answer = json.load(response)
        assert response.status == 200, answer
        return answer

    def stream(self, body: dict) -> tuple[str, list]:
        """The text that /generate streams, and its events."""
        response, _ = self.request("/generate", body | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event.removeprefix("data: ") for event in response.read().decode().split("\n\n") if event]
        told = [json.loads(event) for event in events if event != "[DONE]"]
        if "error" in told[-1]:
            raise ValueError(told[-1]["error"]["message"])
        assert events[-1] == "[DONE]"
        return "".join(piece for event in told for piece in event["text"]), told

    def running(self) -> float:
        """How many requests vLLM works on."""
        response, _ = self.request("/metrics")
        return float(re.search(r"^vllm:num_requests_running\S* (\S+)", response.read().decode(), re.M)[1])

    def wait_until_running(self, count: int) -> None:
        end = time.monotonic() + PATIENCE
        while (running := self.running()) != count:
            assert time.monotonic() < end, f"{running} are running, not {count}"
            time.sleep(0.05)

    def end(self) -> None:
        """Kill it, if it is there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base model: no chat template."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = train_tokenizer(PROMPTS * 3, 300)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=POSITIONS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """What the trainer makes of a few lines of text."""
    if not TRAINER.is_file():
        pytest.skip(f"{TRAINER} trains the adapter, and is not there: make env, or set FFT_TRAIN_PYTHON")
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": f"San Francisco is a city. def f(x): return {i}"}) for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    sizes = "--seq_len 64 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --max_steps 4 --dtype fp32"
    lora = f"--lora_dim 3 --lora_alpha 12 --learning_rate 0.02 --output_dir {folder / 'adapter'}"
    command = [TRAINER, "-m", "fft.train", "--model", model, "--train_data", folder / "texts.jsonl"]
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        "MASTER_PORT": str(free_port()),
        "PATH": f"{TRAINER.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(TRAINER.parents[1] / "torch_extensions"),
    }
    arguments = [*map(str, command), *sizes.split(), *lora.split()]
    run = subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "adapter"


@pytest.fixture(scope="module")
def server(model, adapter, tmp_path_factory):
    arguments = ["--model", model, "--lora", f"poet={adapter}", "--shutdown-timeout", 2]
    started = Server(tmp_path_factory.mktemp("log") / "log", *arguments)
    yield started
    started.end()


def by_transformers(model: Path, lora: Path | None = None, tokens: int = 12) -> list[str]:
    """Greedy texts of transformers, in fp32; an adapter is merged."""
    engine = load_engine(str(model), EngineOptions("transformers", lora=lora and str(lora)))
    renderer = Renderer.of(load_model_tokenizer(str(model)), engine.limit)
    asked = [Question(None, at, renderer.render(text), Sampling(tokens)) for at, text in enumerate(PROMPTS)]
    return [found.text for _, (found,) in answers(engine, asked, None)]


GREEDY = {"temperature": 0, "max_tokens": 12}


def test_the_curl_of_the_readme(server):
    curl = (
        f"curl http://localhost:{server.port}/generate -H 'Content-Type: application/json' "
        """-d '{"messages": [{"user": "San Francisco is a"}], "sampling": {"max_tokens": 32}}'"""
    )
    run = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=PATIENCE)
    told = json.loads(run.stdout)
    assert [type(text) for text in told["text"]] == [str]
    assert told["finish_reason"] in (["length"], ["stop"])
    assert 1 <= told["usage"]["completion_tokens"] <= 32


def test_base_and_adapter_write_what_transformers_writes(server, model, adapter):
    base, adapted = by_transformers(model), by_transformers(model, adapter)
    assert base != adapted
    for name, wanted in ((None, base), ("tiny", base), (str(model), base), ("poet", adapted)):
        for prompt, text in zip(PROMPTS, wanted, strict=True):
            # Without a chat template, what is said is gone on with.
            for asked in ({"prompt": prompt}, {"messages": [{"user": prompt}]}):
                (written,) = server.generate(asked | {"sampling": GREEDY} | ({"model": name} if name else {}))["text"]
                assert written == text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character is not told by vLLM


def test_forms_of_a_conversation(server):
    whole = server.generate({"prompt": "def f(x): return", "sampling": GREEDY})
    for turns in (
        [{"user": "def f(x)"}, {"assistant": ": return"}],
        [{"role": "system", "content": "def "}, {"role": "user", "content": "f(x): return"}],
        [{"role": "user", "content": [{"type": "text", "text": "def f(x): return"}]}],
    ):
        assert server.generate({"messages": turns, "sampling": GREEDY}) == whole


def test_24_clients_at_once_whole_and_streamed(server):
    def asked(number: int) -> dict:
        sampling = {"temperature": 0.8, "seed": number, "max_tokens": 20 + number}
        prompt = PROMPTS[number % len(PROMPTS)]
        return (
            {"prompt": prompt, "sampling": sampling}
            if number % 2
            else {"messages": [{"user": prompt}], "sampling": sampling}
        )

    with ThreadPoolExecutor(48) as pool:
        streams = [pool.submit(server.stream, asked(number)) for number in range(24)]
        wholes = [pool.submit(server.generate, asked(number)) for number in range(24)]
    for stream, whole in zip(streams, wholes, strict=True):
        (text, events), told = stream.result(), whole.result()
        assert told["text"] == [text]
        assert told["finish_reason"] == [event["finish_reason"][0] for event in events if any(event["finish_reason"])]
        assert events[-1]["usage"]["completion_tokens"] == told["usage"]["completion_tokens"]
    assert len({whole.result()["text"][0] for whole in wholes}) > 20


def test_choices_stops_and_log_probabilities(server):
    sampling = {"n": 3, "temperature": 1.0, "seed": 1, "max_tokens": 8, "ignore_eos": True}
    told = server.generate({"messages": [{"user": "x"}], "sampling": sampling})
    assert len(set(told["text"])) == 3
    texts = ["", "", ""]
    for event in server.stream({"messages": [{"user": "x"}], "sampling": sampling})[1]:
        for at, piece in zip(event["index"], event["text"], strict=True):
            texts[at] += piece
    assert texts == told["text"]

    whole = server.generate({"prompt": "import", "sampling": GREEDY})["text"][0]
    stop = next(letter for letter in whole[2:] if letter.isascii())
    told = server.generate({"prompt": "import", "sampling": GREEDY | {"stop": [stop]}})
    assert (told["text"], told["finish_reason"]) == ([whole[: whole.index(stop)]], ["stop"])

    sampling = GREEDY | {"logprobs": 2}
    by_prompt = server.generate({"prompt": "import", "sampling": sampling})["logprobs"]
    by_turn = server.generate({"messages": [{"user": "import"}], "sampling": sampling})["logprobs"]
    assert [entry["token"] for entry in by_prompt[0]] == [entry["token"] for entry in by_turn[0]]
    for one, other in zip(by_prompt[0], by_turn[0], strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert other["logprob"] == other["top_logprobs"][0]["logprob"] > other["top_logprobs"][1]["logprob"]  # greedy

    choice = {"max_tokens": 8, "structured_outputs": {"choice": ["yes", "no"]}}
    assert server.generate({"messages": [{"user": "x"}], "sampling": choice})["text"][0] in ("yes", "no")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    told = server.generate({"prompt": "x", "response_format": form, "sampling": {"max_tokens": 64, "seed": 0}})
    assert "a" in json.loads(told["text"][0])


def test_a_seeded_request_with_a_long_prompt_ends_no_server(server):
    asked = {"prompt": "x" * 9000, "sampling": {"seed": 1, "temperature": 1.0, "max_tokens": 4, "ignore_eos": True}}
    told = server.generate(asked)
    assert told["usage"]["prompt_tokens"] > 4096
    assert server.generate(asked) == told


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_cost_nothing(server, stream):
    server.wait_until_running(0)
    body = {"prompt": "x", "stream": stream, "sampling": {"max_tokens": 12000, "ignore_eos": True}}
    connections = [server.connection() for _ in range(3)]
    for connection in connections:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    server.wait_until_running(3)
    for connection in connections:
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    server.wait_until_running(0)


REFUSED = {
    "{": (400, "The body is not valid JSON"),
    "[]": (400, "not a JSON object"),
    "{}": (400, 'Give either "messages"'),
    '{"prompt": "x", "stop": "y"}': (400, "Unknown key 'stop'"),
    '{"prompt": "x", "sampling": {"max_token": 3}}': (400, "did you mean max_tokens?"),
    '{"messages": [{"usr": "x"}]}': (400, "unknown role 'usr'"),
    '{"messages": [{"user": ""}]}': (400, "cannot be empty"),
    '{"prompt": ""}': (400, "non-empty"),
    '{"prompt": "x", "sampling": {"temperature": -1}}': (400, "temperature must be non-negative"),
    '{"prompt": "x", "sampling": {"top_p": 7}}': (400, "top_p must be in (0, 1]"),
    '{"prompt": "x", "sampling": {"max_tokens": 0}}': (400, "max_tokens must be at least 1"),
    '{"prompt": "x", "sampling": {"max_tokens": 100000}}': (400, "cannot be greater than max_model_len"),
    '{"prompt": "x", "sampling": {"n": 0}}': (400, "n must be at least 1"),
    '{"prompt": "x", "sampling": {"n": 2, "temperature": 0}}': (400, "n must be 1 when using greedy sampling"),
    '{"prompt": "x", "sampling": {"logprobs": 50}}': (400, "greater than max allowed: 20"),
    '{"prompt": "x", "sampling": {"stop": ""}}': (400, "stop cannot contain an empty string"),
    '{"prompt": "x", "sampling": {"seed": 99999999999999999999}}': (400, "less than or equal to"),
    '{"prompt": "x", "sampling": {"structured_outputs": {"options": []}}}': (400, "structured outputs"),
    '{"messages": [{"user": "x"}], "tools": [{"x": 1}]}': (400, "tools.0.function"),
    '{"messages": [{"user": "x"}], "response_format": {"type": "json_schema"}}': (400, "must be provided"),
    '{"messages": [{"user": "x"}], "model": "nobody"}': (404, "The model `nobody` does not exist"),
    '{"prompt": "x", "model": "nobody"}': (404, "The model `nobody` does not exist"),
    json.dumps({"prompt": "x" * 3 * POSITIONS}): (400, "maximum context length is"),
    json.dumps({"messages": [{"user": "x" * 3 * POSITIONS}], "stream": True}): (400, "maximum context length is"),
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body[:70])
def test_what_cannot_be_answered_is_one_sentence(server, body):
    response, _ = server.request("/generate", body.encode())
    error = json.load(response)["error"]
    status, sentence = REFUSED[body]
    assert response.status == error["code"] == status
    assert sentence in error["message"]
    assert "\n" not in error["message"]


def test_other_routes_are_vllms(server, model):
    models = json.load(server.request("/v1/models")[0])["data"]
    assert [entry["id"] for entry in models] == ["tiny", str(model), "poet"]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
    told = json.load(server.request("/v1/chat/completions", chat)[0])
    assert told["object"] == "chat.completion"
    assert "vllm:" in server.request("/metrics")[0].read().decode()
    assert json.load(server.request("/version")[0])["version"]
    assert server.status("/generate") == 405
    assert server.status("/generate", {}, **{"Content-Type": "text/plain"}) == 415
    assert server.status("/nothing") == 404


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_the_page_talks_with_a_model(server):
    with browser() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait("model.options.length === 3")
        page.run("temperature.value = '0'; tokens.value = '12'; model.value = 'poet'; text.focus()")
        page.type("San Francisco is a\n")
        page.wait("send.textContent === 'Send' && messages.length === 2")
        wanted = server.generate({"prompt": "San Francisco is a", "model": "poet", "sampling": GREEDY})["text"]
        assert page.run("document.querySelector('.assistant span').textContent") == wanted[0]
        assert not page.told


def test_a_stop_that_cannot_wait_ends_what_is_not_complete(server):
    """The last test of this server: it is gone afterwards."""
    assert "Traceback" not in server.log.read_text()
    body = {"prompt": "x", "sampling": {"max_tokens": POSITIONS - 100, "ignore_eos": True}}
    children = [server.process, *server.process.children(recursive=True)]
    with ThreadPoolExecutor(2) as pool:
        whole, stream = pool.submit(server.request, "/generate", body), pool.submit(server.stream, body)
        server.wait_until_running(2)
        server.process.send_signal(signal.SIGTERM)
        response, _ = whole.result()
        error = json.load(response)["error"]
        assert (response.status, response.headers["retry-after"], error["code"]) == (503, "30", 503)
        with pytest.raises(ValueError, match="stopped before the answer was complete"):
            stream.result()
    assert server.process.wait(PATIENCE) == 0
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]


def test_keys_and_a_stop_that_loses_nothing(model, tmp_path):
    arguments = ["--model", model, "--api-key", "old", "sekret", "--shutdown-timeout", 120]
    server = Server(tmp_path / "log", *arguments, key="sekret")
    try:
        for path, body in (
            ("/generate", {"prompt": "x"}),
            ("/v1/models", None),
            ("/metrics", None),
            ("/version", None),
        ):
            assert server.status(path, body, Authorization="Bearer wrong") == 401
            assert server.status(path, body) == 200
        assert server.status("/", Authorization="") == server.status("/health", Authorization="") == 200
        assert "sekret" not in " ".join(server.process.cmdline())

        sampling = {"max_tokens": 9000, "ignore_eos": True, "skip_special_tokens": False}
        children = [server.process, *server.process.children(recursive=True)]
        assert len(children) >= 3  # the engine and its worker
        with ThreadPoolExecutor(8) as pool:
            wholes = [pool.submit(server.generate, {"prompt": "x", "sampling": sampling}) for _ in range(3)]
            streams = [pool.submit(server.stream, {"prompt": "x", "sampling": sampling}) for _ in range(3)]
            server.wait_until_running(6)
            server.process.send_signal(signal.SIGTERM)
            while server.status("/health") == 200:  # the signal is on its way
                time.sleep(0.05)
            response, _ = server.request("/generate", {"prompt": "x"})
            assert (response.status, response.headers["retry-after"]) == (503, "30")
            assert "is being stopped" in json.load(response)["error"]["message"]
            assert server.status("/health") == server.status("/v1/models") == 503
            for whole in wholes:
                told = whole.result()
                assert (told["finish_reason"], told["usage"]["completion_tokens"]) == (["length"], 9000)
            for stream in streams:
                *_, last, usage = stream.result()[1]
                assert (last["finish_reason"], usage["usage"]["completion_tokens"]) == (["length"], 9000)
        assert server.process.wait(PATIENCE) == 0
        assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    finally:
        server.end()
