import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fft.errors import UserError
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve import batch_infer
from fft.serve.batch_infer import Prompt, read_prompts, write_completions
from fft.serve.engines import Completion, Sampling, load_engine

PROMPTS = ["def f(x):", "import", "class A:\n    def g(self, value):\n        return", "x", "for i in range("]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer(PROMPTS * 3, 300)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: object) -> None:
    batch_infer.main([str(argument) for argument in arguments])


def test_batches_equal_prompts_generated_one_by_one(model_dir):
    engine = load_engine("transformers", str(model_dir), batch_size=4)
    batches = list(engine.generate(PROMPTS, Sampling(max_new_tokens=12)))
    assert [len(batch) for batch in batches] == [4, 1]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for prompt, completion in zip(PROMPTS, itertools.chain.from_iterable(batches), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        new = ids[inputs["input_ids"].shape[1] :].tolist()
        assert completion.text == tokenizer.decode(new, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if 0 in new else "length")


def test_sampling_repeats_with_its_seed_and_changes_with_another(model_dir):
    engine = load_engine("transformers", str(model_dir), batch_size=8)

    def sample(seed: int) -> list[Completion]:
        return next(engine.generate(PROMPTS, Sampling(max_new_tokens=8, temperature=1.0, top_p=0.95, seed=seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_end_of_sequence_ends_the_text(model_dir):
    engine = load_engine("transformers", str(model_dir), batch_size=8)
    first = engine._completion([70, 71, 0, 72, 72])
    assert (first.tokens, first.finish_reason) == (2, "stop")
    assert engine._completion([70, 71]).finish_reason == "length"


def test_command_writes_prompts_texts_and_other_fields(model_dir, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    source.write_text("".join(json.dumps({"q": p, "n": i}) + "\n" for i, p in enumerate(PROMPTS)), encoding="utf-8")
    arguments = ("--model", model_dir, "--input", source, "--output", output, "--prompt_key", "q")
    run(*arguments, "--max_new_tokens", 4, "--engine", "transformers")
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["n"]) for line in lines] == [(p, i) for i, p in enumerate(PROMPTS)]
    assert all(set(line) == {"prompt", "text", "finish_reason", "n"} for line in lines)
    assert "5/5 prompts" in capsys.readouterr().err
    assert [p.name for p in output.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(UserError, match="exists: choose another file or add --overwrite"):
        run(*arguments)


def test_reads_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \r\nthree", encoding="utf-8")
    assert [p.text for p in read_prompts(tmp_path / "a.txt", "prompt")] == ["one", "  two ", "three"]
    pq.write_table(pa.table({"prompt": ["a", "b"], "k": [1, 2]}), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet", "prompt") == [Prompt("a", {"k": 1}), Prompt("b", {"k": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', r"line 2 has no 'prompt' \(it has text\): name it with --prompt_key"),
        ('{"prompt": "a"\n', "line 1 is not JSON"),
        ('["a"]\n', "line 1 is not a JSON object"),
        ('{"prompt": 3}\n', "line 1: 'prompt' must be a string, not int"),
        ('{"prompt": "a", "text": "b"}\n', "has a field 'text', which the output needs"),
        ("\n", "holds no prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_prompts(path, "prompt")


def test_bad_paths_are_named(model_dir, tmp_path):
    for path, message in (("none.jsonl", "does not exist"), ("x.csv", "not '.csv'")):
        if path.endswith("csv"):
            (tmp_path / path).touch()
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / path, "prompt")
    rest = ("--input", tmp_path / "x.csv", "--output", tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="is not a folder"):
        run("--model", tmp_path / "nowhere", *rest)
    with pytest.raises(UserError, match=r"has no config\.json"):
        run("--model", tmp_path, *rest)


def test_an_empty_prompt_is_refused_when_it_has_no_tokens(model_dir):
    engine = load_engine("transformers", str(model_dir), batch_size=8)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        next(engine.generate(["a", ""], Sampling()))


def test_vllm_asked_for_but_absent(model_dir, monkeypatch):
    monkeypatch.setattr("fft.serve.engines._has_vllm", lambda: False)
    with pytest.raises(UserError, match="--engine vllm: not installed"):
        load_engine("vllm", str(model_dir), 8)


def test_a_failure_leaves_no_output(tmp_path):
    def broken():
        yield [Completion("a", 1, "length")]
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        write_completions(tmp_path / "out.jsonl", [Prompt("p"), Prompt("q")], broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_bytes_that_are_no_text_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2 is not UTF-8"):
        read_prompts(tmp_path / name, "prompt")


def test_a_model_without_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        load_engine("transformers", str(tmp_path), 8)
