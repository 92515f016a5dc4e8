"""Chat templates that never end or take all memory end a command with a sentence, or make a record malformed."""

import os
import signal
import threading
from datetime import datetime
from types import SimpleNamespace

import pytest

from fft.errors import UserError
from fft.text import chat_template, template_limits
from fft.text.chat_template import ChatTemplate, load_chat_template
from fft.text.records import Malformed

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
#: As an output that grows, by one step, and by one that Jinja makes while it compiles.
FILL = [
    "{% set s = 'a' * 1000000 %}{% for a in range(99999) %}{{ s ~ a }}{% endfor %}",
    "{{ messages[0].content * 9000000000 }}",
    "{{ 'a' * 9000000000 }}",
]


def tokenizer_with(source):
    """What a template is asked from."""
    return SimpleNamespace(
        get_chat_template=lambda tools=None: source,
        special_tokens_map={},
        added_tokens_decoder={},
        all_special_tokens=[],
        apply_chat_template=lambda messages, tokenize: "".join(m["content"] for m in messages),
    )


@pytest.mark.parametrize("source", [LOOP, f"{PLAIN}{{% if tools %}}{LOOP}{{% endif %}}"])
def test_one_that_does_not_end_is_refused(source, monkeypatch):
    monkeypatch.setattr(template_limits, "_TRIED_SECONDS", 1)
    before = children()  # of other tests in this process
    with pytest.raises(UserError, match=r"`tokenizer` evil: its chat template does not end within 1 s for a plain"):
        load_chat_template(tokenizer_with(source), "evil")
    assert children() <= before


@pytest.mark.parametrize("source", FILL)
def test_one_that_takes_memory_is_refused_and_takes_none_here(source, monkeypatch):
    monkeypatch.setattr(template_limits, "_TRIED_BYTES", 200 << 20)
    with pytest.raises(UserError, match=r"`tokenizer` evil: its chat template takes more than 209,715,200 bytes"):
        load_chat_template(tokenizer_with(source), "evil")


def test_a_good_one_is_tried_and_leaves_nothing():
    before = children()
    load_chat_template(tokenizer_with(PLAIN), "good")
    assert template_limits.fault_of(lambda: None) is None
    assert template_limits.fault_of(lambda: 1 / 0) is None
    assert children() <= before


def test_one_that_does_not_end_for_a_record_makes_it_malformed(monkeypatch):
    monkeypatch.setattr(chat_template, "LONGEST", 0.2)
    template = ChatTemplate(f"{{% if messages|length > 1 %}}{LOOP}{{% endif %}}{PLAIN}", (), datetime.now())
    message = {"role": "user", "content": "a"}
    assert template.render([message]) == "a"
    with pytest.raises(Malformed, match="the chat template does not end within 0 s for it"):
        template.render([message] * 2)
    assert template.render([message]) == "a"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_threads_render_too():
    found = []
    template = ChatTemplate(PLAIN, (), datetime.now())
    thread = threading.Thread(target=lambda: found.append(template.render([{"role": "user", "content": "a"}])))
    thread.start()
    thread.join()
    assert found == ["a"]


def children() -> set[str]:
    """Numbers of this process's children."""
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as stream:
        return set(stream.read().split())
