"""The page at /, in a real browser, around a stub of vLLM's routes."""

import contextlib
import json
import socket
import threading

import pytest
from browser import CHROMIUM, browser
from stub_chat import StubChat

from fft.serve.middleware import API_KEYS, Generate

uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")

EVIL = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> & <b>bold</b>"


@contextlib.contextmanager
def served(app):
    """The URL at which an ASGI app is served."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.delenv(API_KEYS, raising=False)
    return StubChat("Hello dear friend", finish="stop", cut=5)


def turns(page) -> list:
    script = "[...document.querySelectorAll('.turn')].map(t => [t.className, t.firstChild.textContent])"
    return [tuple(turn) for turn in page.run(script)]


def say(page, text: str) -> None:
    page.run("document.getElementById('text').focus()")
    page.type(f"{text}\n")
    page.wait("send.textContent === 'Send'")


def test_a_conversation_streams_and_goes_on(page, stub):
    stub.pause = 0.15
    with served(Generate(stub)) as url:
        page.open(url)
        page.wait("model.options.length === 2")
        page.run("document.getElementById('text').focus()")
        page.type("Hi\n")
        page.wait("document.querySelector('.turn.assistant span')?.textContent === 'Hello '")  # before it is complete
        assert page.run("send.textContent") == "Stop"
        page.wait("send.textContent === 'Send'")
        page.run("model.value = 'poet'; temperature.value = '0.5'; tokens.value = ''")
        say(page, "And <now>?")
    assert turns(page) == [
        ("turn user", "Hi"),
        ("turn assistant", "Hello dear friend"),
        ("turn user", "And <now>?"),
        ("turn assistant", "Hello dear friend"),
    ]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first = {"role": "user", "content": "Hi"}
    second = [first, {"role": "assistant", "content": "Hello dear friend"}, {"role": "user", "content": "And <now>?"}]
    assert stub.asked == [
        {"messages": [first], "model": "models/base", "max_tokens": 512, **options},
        {"messages": second, "model": "poet", "temperature": 0.5, **options},
    ]
    assert not page.told


def test_what_a_model_writes_stays_text(page, stub):
    stub.texts = [EVIL]
    with served(Generate(stub)) as url:
        page.open(url)
        say(page, EVIL)
    assert turns(page) == [("turn user", EVIL), ("turn assistant", EVIL)]
    assert page.run("[document.querySelectorAll('main img, main script, main b').length, window.broken ?? 0]") == [0, 0]
    assert not page.told


def test_nothing_foreign_is_run_or_fetched(page, stub):
    with served(Generate(stub)) as url:
        page.open(url)
        page.run("window.s = document.createElement('script'); s.textContent = 'window.broken = 1'")
        page.run("document.body.append(s)")
        assert page.run("fetch('https://example.org/').then(() => 'fetched', () => 'refused')") == "refused"
        assert page.run("window.broken ?? 0") == 0
    assert len(page.told) >= 2
    page.told.clear()


def test_the_key_is_asked_for_and_used(page, stub, monkeypatch):
    monkeypatch.setenv(API_KEYS, json.dumps(["sekret"]))
    with served(Generate(stub)) as url:
        page.open(url)
        page.wait("model.options[0]?.text === 'needs the API key'")
        say(page, "Hi")
        ((kind, told),) = turns(page)
        assert kind == "turn error"
        assert "API key is missing or wrong" in told
        assert page.run("text.value") == "Hi"  # to send again
        page.run("key.focus()")
        page.type("sekret")
        page.run("key.blur()")
        page.wait("model.options.length === 2")
        page.run("text.value = ''")
        say(page, "Hi")
        assert turns(page)[1:] == [("turn user", "Hi"), ("turn assistant", "Hello dear friend")]
    page.told.clear()  # of the 401


def test_errors_stop_and_new_chats(page, stub):
    with served(Generate(stub)) as url:
        page.open(url)
        page.run("tokens.value = '0'")
        stub.error = (400, {"error": {"message": "max_tokens must be at least 1, got 0."}})
        say(page, "Hi")
        assert turns(page) == [("turn error", "max_tokens must be at least 1, got 0.")]
        stub.error, stub.pause, stub.texts = None, 0.1, ["one " * 30]
        page.run("clear(); text.value = ''; text.focus()")
        page.type("Count\n")
        page.wait("document.querySelector('.assistant span')?.textContent.length > 4")
        page.run("send.click()")
        page.wait("send.textContent === 'Send'")
        page.wait("document.querySelector('.note')?.textContent === 'stopped'")
        page.run("document.getElementById('clear').click()")
        assert turns(page) == []
        assert page.run("messages.length") == 0
    page.told.clear()


@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits(page, stub, width, tmp_path):
    stub.texts = ["A long line of words. " * 40 + "x" * 300]
    with served(Generate(stub)) as url:
        page.open(url, width=width)
        page.wait("model.options.length === 2")
        say(page, "Tell me something long, please.")
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("document.documentElement.scrollHeight") == 800
        seen = "[...document.querySelectorAll('input,select,button,.turn')]"
        assert max(page.run(f"{seen}.map(one => one.getBoundingClientRect().right)")) <= width
        assert page.run("send.getBoundingClientRect().bottom") <= 800
        assert page.run("document.querySelector('main').clientHeight") > 350
        page.picture(tmp_path / f"{width}.png")  # for whoever wants to look: --basetemp
