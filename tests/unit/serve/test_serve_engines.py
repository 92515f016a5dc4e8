"""Engines, without vLLM: transformers, and a stand-in that takes what vLLM is told."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from generation import PROMPTS, complete, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fft.errors import UserError
from fft.serve.engines import Completion, EngineOptions, Request
from fft.serve.engines.choice import load_engine
from fft.serve.engines.scores import Choice
from fft.serve.sampling import Sampling, row_seed
from fft.serve.window import Question, answers


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_batches_equal_prompts_generated_one_by_one(model_dir):
    completions = complete(model_dir, batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        new = ids[inputs["input_ids"].shape[1] :].tolist()
        assert completion.text == tokenizer.decode(new, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if 0 in new else "length")


def test_sampling_repeats_with_its_seed_and_changes_with_another(model_dir):
    def sample(seed: int) -> list[Completion]:
        return complete(model_dir, temperature=1.0, top_p=0.95, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_vllm_asked_for_but_absent(model_dir, monkeypatch):
    monkeypatch.setattr("fft.serve.engines.checked._has_vllm", lambda: False)
    with pytest.raises(UserError, match="--engine vllm: not installed"):
        load_engine(str(model_dir), EngineOptions("vllm"))


@pytest.fixture
def changed(model_dir, tmp_path):
    """A copy of the model, to be changed: `changed(file, **entries)` returns its folder."""
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)

    def change(file: str, **entries):
        path = copy / file
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | entries))
        return str(copy)

    return change


#: What models bring along that would change which token is taken.
HABITS = {
    **{"do_sample": True, "repetition_penalty": 9.0, "num_beams": 3, "min_p": 0.3, "top_k": 2, "temperature": 3.0},
    **{"no_repeat_ngram_size": 1, "suppress_tokens": list(range(60, 200)), "min_new_tokens": 12, "max_length": 20},
    **{"typical_p": 0.2, "epsilon_cutoff": 0.2, "length_penalty": 2.0},
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8}])
def test_tokens_are_chosen_as_the_flags_say_whatever_the_model_s_habits(sampling, model_dir, changed):
    plain = complete(model_dir, **sampling)
    assert complete(changed("generation_config.json", **HABITS), **sampling) == plain


def test_every_end_token_ends_a_text(model_dir, changed):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(model_dir)(PROMPTS[0], return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    new = ids[inputs["input_ids"].shape[1] :].tolist()
    at = next(at for at, token in enumerate(new) if token != new[0])
    (found,) = complete(changed("generation_config.json", eos_token_id=[290, new[at]]), PROMPTS[:1])
    assert (found.tokens, found.finish_reason) == (at, "stop")


def test_a_sample_depends_on_its_row_and_seed_alone(model_dir):
    prompts = ["x"] * 7
    alone = complete(model_dir, prompts, 1, temperature=1.0, seed=5)
    assert complete(model_dir, prompts, 3, temperature=1.0, seed=5) == alone
    assert len({sample.text for sample in alone}) == 7
    other = complete(model_dir, prompts, 3, temperature=1.0, seed=6)
    assert not {sample.text for sample in alone} & {sample.text for sample in other}


def test_top_p_keeps_the_likeliest(model_dir):
    greedy = complete(model_dir)
    assert complete(model_dir, temperature=1.0, top_p=1e-6) == greedy
    assert complete(model_dir, temperature=1.0, top_p=1.0) != greedy


def test_tokens_are_drawn_with_their_probabilities():
    """Of 200 tokens all alike, more than 50 are drawn; of two, each as often as it is likely."""

    def draws(scores, temperature=1.0, **given):
        sampling = Sampling(temperature=temperature, **given)
        requests = [Request(row, [0], sampling, row_seed(1, row), 1) for row in range(4000)]
        choice = Choice(requests, 1, scores.shape[1], torch.device("cpu"))
        return choice(torch.zeros(4000, 1, dtype=torch.long), scores.expand(4000, -1)).argmax(-1)

    assert len(draws(torch.zeros(1, 200)).unique()) == 200
    share = (draws(torch.tensor([[0.7, 0.3]]).log()) == 0).float().mean()
    assert abs(share - 0.7) < 0.03
    sharper = (draws(torch.tensor([[0.7, 0.3]]).log(), temperature=0.5) == 0).float().mean()
    assert abs(sharper - 0.49 / 0.58) < 0.03
    assert set(draws(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6).tolist()) == {0, 1}


def test_seeds_of_rows_do_not_repeat_nor_shift():
    seeds = [[row_seed(seed, row) for row in range(3000)] for seed in (1, 2)]
    assert len({*seeds[0], *seeds[1]}) == 6000
    assert all(0 <= seed < 1 << 63 for seed in seeds[0])


def test_vllm_is_told_all_of_the_sampling(model_dir, monkeypatch):
    """With a stand-in for vLLM: the engine's arguments, and every request's parameters."""
    told = []

    class LLM:
        def __init__(self, **given):
            told.append(given)
            self.llm_engine = self

        def add_request(self, name, prompt, parameters, lora_request):
            told.append((prompt["prompt_token_ids"], parameters))
            self.waiting = [*getattr(self, "waiting", []), name]

        def step(self):
            output = SimpleNamespace(text="", token_ids=[70, 0], finish_reason="stop", stop_reason=0)
            done, self.waiting = self.waiting, []
            return [SimpleNamespace(request_id=name, outputs=[output], finished=True) for name in done]

    platform = SimpleNamespace(is_cpu=lambda: True)
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **given: given))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    monkeypatch.setattr("fft.serve.engines.checked._has_vllm", lambda: True)
    engine = load_engine(str(model_dir), EngineOptions(max_model_len=99, engine_args={"enforce_eager": True}))
    sampling = Sampling(7, 0.6, 0.8, top_k=5, n=2, seed=4, stop=("x",), stop_token_ids=(9,))
    found = list(answers(engine, [Question(row, row, [1, 2], sampling) for row in range(2500)]))
    engine.close()
    assert [(q.item, len(a), {c.tokens for c in a}) for q, a in found] == [(row, 2, {1}) for row in range(2500)]
    given, *requests = told
    assert given.pop("kv_cache_memory_bytes") <= 4 << 30
    assert given == {
        **{"model": str(model_dir), "dtype": "float32", "max_model_len": 99, "tensor_parallel_size": 1},
        **{"trust_remote_code": False, "enforce_eager": True},
        **{"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
        "hf_overrides": {"tie_word_embeddings": False},
    }
    assert [p["seed"] for _, p in requests] == [row_seed(4, row, k) for row in range(2500) for k in (0, 1)]
    plain = {k: v for k, v in requests[0][1].items() if k in ("max_tokens", "temperature", "top_p", "top_k")}
    assert plain == {"max_tokens": 7, "temperature": 0.6, "top_p": 0.8, "top_k": 5}
    assert (requests[0][1]["stop"], requests[0][1]["stop_token_ids"]) == (["x"], [0, 9])


def rewritten(folder, change):
    """The weights of a folder, changed."""
    weights = load_file(f"{folder}/model.safetensors")
    change(weights)
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    return folder


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda weights: weights.pop(NORM), f"has no tensor {NORM}"),
        (lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias, for"),
        (lambda weights: weights.update({NORM: torch.full((32,), torch.nan)}), f"{NORM} holds values that are NaN"),
        (lambda weights: weights.update({NORM: torch.ones(31)}), "cannot be loaded"),
        (lambda weights: weights.update({NORM: torch.ones(32, dtype=torch.int8)}), "cannot be loaded|holds codes"),
    ],
)
def test_weights_that_are_none_are_named(harm, said, changed):
    with pytest.raises(UserError, match=said):
        complete(rewritten(changed("config.json"), harm))


def test_a_file_that_is_cut_is_named(changed):
    folder = changed("config.json")
    with open(f"{folder}/model.safetensors", "r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(UserError, match="is no readable safetensors file"):
        complete(folder)


def test_a_tokenizer_larger_than_the_model_is_named(changed):
    folder = changed("config.json", vocab_size=200)
    with pytest.raises(UserError, match=r"has a tokenizer of \d+ tokens, and its config\.json a vocab_size of 200"):
        complete(rewritten(folder, lambda w: w.update({n: w[n][:200] for n in w if w[n].shape[0] > 200})))


def test_a_config_that_is_broken_is_not_taken_for_a_missing_tokenizer(changed):
    with pytest.raises(UserError, match=r"config\.json is not a model configuration"):
        complete(changed("config.json", hidden_size="many"))
    with pytest.raises(UserError, match=r"is quantized .quant_method 'gptq'"):
        complete(changed("config.json", hidden_size=32, quantization_config={"quant_method": "gptq"}))


def test_fp8_is_multiplied_out(model_dir, changed):
    """Codes and scales that are exactly the plain weights."""
    name, fp8 = "model.layers.1.mlp.up_proj.weight", torch.float8_e4m3fn

    def coded(weights):
        weights[name] = weights[name].to(fp8)
        weights[f"{name}_scale_inv"] = torch.ones(4, 2)

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    found = complete(rewritten(changed("config.json", quantization_config=settings), coded))
    shutil.copy(model_dir / "model.safetensors", changed("config.json", quantization_config=None))
    plain = complete(
        rewritten(changed("config.json"), lambda weights: weights.update({name: weights[name].to(fp8).float()}))
    )
    assert found == plain


def test_a_model_without_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        load_engine(str(tmp_path), EngineOptions("transformers"))
