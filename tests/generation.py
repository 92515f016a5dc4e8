"""Tiny models to generate with, and one way to ask them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fft.errors import UserError
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve import batch_infer
from fft.serve.engines import Completion, Engine, EngineOptions
from fft.serve.engines.choice import load_engine
from fft.serve.prompts import Renderer, load_model_tokenizer
from fft.serve.sampling import Sampling
from fft.serve.window import Question, answers

PROMPTS = ["def f(x):", "import", "class A:\n    def g(self, value):\n        return", "x", "for i in range("]
#: A template as many models have it, with a token of its own for the end of a turn.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, seed: int = 0, template: str | None = None, **settings: int) -> Path:
    """A Llama of 2 layers with random weights and a tokenizer; ``settings`` go to its config."""
    tokenizer = train_tokenizer(PROMPTS * 3, 300)
    save_tokenizer(tokenizer, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        **sizes | settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ask(
    engine: Engine, model: Path, prompts: list, window: int | None = None, chat_texts: bool = True, **sampling
) -> list[list[Completion]]:
    """The answers of an engine to prompts, each prompt's in a list; ``chat_texts``: texts are turns where they can."""
    renderer = Renderer.of(load_model_tokenizer(str(model)), engine.limit, "auto" if chat_texts else "no")
    settings = Sampling(**{"max_new_tokens": 12} | sampling)
    questions = [Question(None, row, renderer.render(prompt), settings) for row, prompt in enumerate(prompts)]
    return [list(found) for _, found in answers(engine, questions, window)]


def complete(model: Path, prompts: list = PROMPTS, batch_size: int = 8, **sampling) -> list[Completion]:
    """What transformers answers to each prompt."""
    engine = load_engine(str(model), EngineOptions("transformers", batch_size))
    return [found for (found,) in ask(engine, model, prompts, **sampling)]


#: Records that are no prompts for a model of 2,048 positions without a chat template, and why.
BAD_PROMPTS = [
    ({"prompt": None}, "'prompt' must be a text or a list of turns, not NoneType"),
    ({"prompt": 3, "id": 1}, "'prompt' must be a text or a list of turns, not int"),
    ({"question": "b"}, "it has no 'prompt' (but question): name it with --prompt_key"),
    ({}, "it has no 'prompt' (but nothing): name it with --prompt_key"),
    ({"prompt": ""}, "the prompt is empty: it has no tokens"),
    (
        {"prompt": "x" * 2048},
        "the prompt has 2,048 tokens, but may have 2,047: the model takes 2,048, one of them for the answer",
    ),
    ({"prompt": "a", "text": "b"}, "it has a field 'text', which the output needs for itself: rename it"),
    ({"prompt": "\ud800"}, "a lone surrogate, which is no Unicode text"),
    ({"messages": [{"user": "x"}]}, "the prompt is a conversation, for which the model has no chat template"),
    (["a"], "the prompt is a conversation, for which the model has no chat template"),
    (3, "not a JSON object but int"),
]


def refusal(model: Path, folder: Path, record: object, engine: str) -> str:
    """What the command says of a file whose second record is this one."""
    (folder / "in.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps(record)}\n')
    flags = ["--model", model, "--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--engine", engine]
    with pytest.raises(UserError) as refused:
        batch_infer.main(list(map(str, flags)))
    return str(refused.value)


def write_lines(path: Path, records: list) -> Path:
    """A file of JSON lines, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
