"""vLLM's engine beside transformers: the same answers, whatever is asked of both."""

import json
import os
from pathlib import Path

import pytest
import torch
from generation import BAD_PROMPTS, TEMPLATE, ask, make_model, refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fft.errors import UserError
from fft.serve.engines import EngineOptions
from fft.serve.engines.choice import load_engine

#: For starts of seconds, in this process.
QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
TEXTS = [line for line in Path(__file__).read_text().splitlines() if len(line) > 20][:24]
CHATS = [
    [{"user": "x"}],
    [{"role": "user", "content": "def f(x):"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "import"}],
    [{"user": "x"}, {"assistant": "return"}, {"user": "for i in"}],
    [{"user": "x"}, {"assistant": "class"}],
    [{"user": "é ☃ \U0001f600"}],
    [{"user": "<|endoftext|>"}],
    [{"user": "a\n\nb "}],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(
        tmp_path_factory.mktemp("model") / "chat", template=TEMPLATE, hidden_size=64, num_attention_heads=2
    )


@pytest.fixture(scope="module")
def engine(model):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = load_engine(str(model), EngineOptions("vllm", engine_args=QUICK))
    yield engine
    engine.close()
    del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text).input_ids


def rendered(tokenizer, turns: list) -> list[int]:
    messages = [
        t if "role" in t else {"role": role, "content": text} for t in turns for role, text in [next(iter(t.items()))]
    ]
    last = messages[-1]["role"] == "assistant"
    given = {"add_generation_prompt": not last, "continue_final_message": last}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)


def test_greedy_texts_are_those_of_transformers_own_generate(model, engine):
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = []
    for ids in [*(plain(tokenizer, text) for text in TEXTS), *(rendered(tokenizer, turns) for turns in CHATS)]:
        inputs = torch.tensor([ids])
        new = reference.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        expected.append((tokenizer.decode(new, skip_special_tokens=True), "stop" if 0 in new else "length"))
    found = ask(engine, model, [*TEXTS, *CHATS], chat_texts=False, max_new_tokens=24)
    assert [(one.text, one.finish_reason) for (one,) in found] == expected
    assert len(expected) == 32


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop": ("e", "\n")},
        {"stop_token_ids": (70, 71, 72, 259)},
        {"ignore_eos": True},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.7, "frequency_penalty": -0.2},
        {"temperature": 1.0, "top_k": 1, "n": 2},
        {"temperature": 0.5, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
    ],
)
def test_both_engines_mean_the_same_by_every_setting(sampling, model, engine):
    found = [one for several in ask(engine, model, [*TEXTS[:8], *CHATS], **sampling) for one in several]
    other = [one for several in ask(transformers_of(model), model, [*TEXTS[:8], *CHATS], **sampling) for one in several]
    assert found == other


_LOADED: dict = {}


def transformers_of(model, **options):
    key = (model, *options.items())
    if key not in _LOADED:
        _LOADED[key] = load_engine(str(model), EngineOptions("transformers", **options))
    return _LOADED[key]


def test_log_probabilities_are_the_same(model, engine):
    prompts = [*TEXTS[:4], CHATS[0]]
    for (found,), (other,) in zip(
        ask(engine, model, prompts, logprobs=3), ask(transformers_of(model), model, prompts, logprobs=3), strict=True
    ):
        assert len(found.logprobs) == found.tokens
        for one, two in zip(found.logprobs, other.logprobs, strict=True):
            assert (one["id"], one["token"]) == (two["id"], two["token"])
            assert one["logprob"] == pytest.approx(two["logprob"], abs=1e-4)
            assert [top["id"] for top in one["top_logprobs"]] == [top["id"] for top in two["top_logprobs"]]


def test_samples_depend_on_row_and_seed_alone(model, engine):
    prompts = ["x"] * 12
    found = ask(engine, model, prompts, temperature=1.0, seed=3)
    assert ask(engine, model, prompts, window=1, temperature=1.0, seed=3) == found
    assert len({one.text for (one,) in found}) == 12
    several = ask(engine, model, prompts, temperature=1.0, seed=3, n=3)
    assert [row[0] for row in several] == [one for (one,) in found]
    assert len({one.text for row in several for one in row}) == 36
    other = ask(engine, model, prompts, temperature=1.0, seed=4)
    assert not {one.text for (one,) in found} & {one.text for (one,) in other}


def test_a_prompt_near_the_limit_is_answered_to_it(model, engine):
    for room in (1, 5):
        prompts = ["x" * (engine.limit - room)]
        sampling = {"chat_texts": False, "ignore_eos": True}
        ((found,),) = ask(engine, model, prompts, **sampling)
        ((other,),) = ask(transformers_of(model), model, prompts, **sampling)
        assert (found.tokens, found.finish_reason) == (other.tokens, other.finish_reason) == (room, "length")


def test_an_adapter_is_added_alike(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    names = [name for name in weights if name.endswith(("q_proj.weight", "down_proj.weight"))]
    matrices = {}
    for name in names:
        rows, columns = weights[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        matrices[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
        matrices[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    engine = load_engine(str(model), EngineOptions("vllm", lora=str(tmp_path), engine_args=QUICK))
    found = ask(engine, model, TEXTS)
    engine.close()
    assert found == ask(transformers_of(model, lora=str(tmp_path)), model, TEXTS)
    assert found != ask(transformers_of(model), model, TEXTS)


@pytest.mark.parametrize(("record", "said"), BAD_PROMPTS)
def test_bad_prompts_are_refused_in_the_same_words(record, said, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.getbasetemp() / "plain"
    model = folder if folder.is_dir() else make_model(folder)
    assert refusal(model, tmp_path, record, "vllm") == refusal(model, tmp_path, record, "transformers")
    assert said in refusal(model, tmp_path, record, "vllm")


def test_what_vllm_cannot_do_is_one_sentence(model, engine):
    for arguments, said in (
        ({"no_such": 1}, r"vLLM cannot start: TypeError: .*no_such.*: mend that, or use --engine transformers"),
        (
            {"kv_cache_memory_bytes": 1 << 10},
            "vLLM cannot start: ValueError: No available memory.*: lower --max_model_len",
        ),
    ):
        with pytest.raises(UserError, match=said):
            load_engine(str(model), EngineOptions("vllm", engine_args=QUICK | arguments))
