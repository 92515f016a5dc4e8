"""What a run tells at its evaluations, on any layout: losses of several tables by name, answers to prompts."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL, write_table
from forked import run_ranks
from spark.chat_templates import save_chat_tokenizer
from thorough import thorough
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fft.arguments import parse_arguments
from fft.models.in_process import write_random_model
from fft.parity_reference import mean_loss
from fft.planning.preflight import plan_run
from fft.report.page import page_of
from fft.report.run import read_run

pytestmark = pytest.mark.slow

RECORDS = [
    {"prompt": "What is the capital of France?"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One and one?"}]},
    *({"prompt": f"Count from {number} on."} for number in range(3)),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen2.5", "qwen2.5")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    sizes = {**SMALL, "model_type": "llama", "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer))}
    write_random_model(AutoConfig.for_model(**{**sizes, "initializer_range": 0.2}), folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def flags(model, tokenizer, ragged_table, tmp_path_factory):
    """Three tables, of which two are evaluated on, and prompts."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for name in ("web", "code"):
        rows = [rng.integers(0, 101, rng.integers(2, 90)).astype(np.int32) for _ in range(12)]
        write_table(folder / name, rows)
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    return [
        *f"--model {model} --tokenizer {tokenizer} --train_data {ragged_table} --seq_len 160 --max_steps 2 "
        "--dtype fp32 --learning_rate 1e-3 --eval_steps 1 --gradient_accumulation_steps 4 --lora_dim 2".split(),
        *("--lora_dropout=0.1", f"--sample_prompts={folder}/prompts.jsonl"),
        f"--eval_data=web={folder}/web code={folder}/code",
    ]


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """Greedy answers of the model before its first step, by transformers."""
    reader, loaded = AutoTokenizer.from_pretrained(tokenizer), AutoModelForCausalLM.from_pretrained(model)
    ends = [reader.eos_token_id, reader.convert_tokens_to_ids("<|im_end|>")]
    answers = []
    for record in RECORDS:
        turns = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        asked = reader.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": ends, "pad_token_id": 0}
        with torch.no_grad():
            ids = loaded.generate(**asked, **options)[0, asked["input_ids"].shape[1] :].tolist()
        ids = ids[:-1] if ids[-1] in ends else ids
        answers.append(reader.decode(ids, skip_special_tokens=True))
    return answers


LAYOUTS = {
    "pipe2-tensor2": (4, "--pipe_parallel_size=2 --model_parallel_size=2"),
    "sequence2-ragged": (2, "--sequence_parallel_size=2 --per_device_train_batch_size=2 --ragged"),
}


@pytest.mark.parametrize("layout", [thorough(name) if name == "pipe2-tensor2" else name for name in LAYOUTS])
def test_named_losses_and_answers(layout, flags, expected, model, tmp_path):
    ranks, more = LAYOUTS[layout]
    run = tmp_path / "run"
    given = [*flags, *more.split(), f"--checkpoint={run}", f"--output_dir={tmp_path / 'model'}"]
    done = run_ranks(ranks, *given)
    assert done.returncode == 0, done.stderr[-3000:]

    told = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in told] == [step for step in range(3) for _ in RECORDS]
    assert [one["answer"] for one in told[: len(RECORDS)]] == expected
    assert [one["prompt"] for one in told[: len(RECORDS)]] == [r.get("prompt") or r["messages"] for r in RECORDS]
    assert done.stderr.count("  sample  ") == 3 * 3

    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [number for number in numbers if "eval_loss" in number]
    assert [number["eval/web/loss"] for number in evaluated] == [number["eval_loss"] for number in evaluated]
    plan = plan_run(parse_arguments([*given, "--overwrite"]), ranks)
    start = AutoModelForCausalLM.from_pretrained(model)
    for name, reader in plan.evaluations.items():
        loss = mean_loss(start, reader)
        assert evaluated[0][f"eval/{name}/loss"] == pytest.approx(loss, rel=1e-5)
        assert evaluated[0][f"eval/{name}/perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
        assert f"step 0/2  validation loss of {name} {loss:.4f} over " in done.stderr
    last = " (perplexity {0:.4g})".format
    tables = "; ".join(
        f"{n} {evaluated[-1][f'eval/{n}/loss']:.4f}{last(evaluated[-1][f'eval/{n}/perplexity'])}"
        for n in ("web", "code")
    )
    assert f"last, by table: {tables}\n" in done.stderr
    assert "Held out: code" in page_of([read_run(run)])
