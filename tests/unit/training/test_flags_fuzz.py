"""Any flags and settings files: a sentence, or the loss that transformers computes of the same rows; no traceback."""

import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_table
from forked import run_ranks
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import TrainArguments, parse_arguments
from fft.data.batches import step_batches
from fft.errors import UserError
from fft.models.in_process import write_random_model
from fft.parity_reference import document_losses, mean_loss
from fft.planning.preflight import batch_plan, plan_run, start_of
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

#: How many commands are tried: `FFT_FUZZ=2000 pytest tests/unit/training/test_flags_fuzz.py` for a long look.
EXAMPLES = int(os.environ.get("FFT_FUZZ", "40"))

pytestmark = pytest.mark.slow

MODELS = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "experts": {
        **{"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "router_aux_loss_coef": 0.1},
    },
}
#: By flag what is right, in a folder of inputs that ``HERE`` stands for, and what is wrong, or extreme.
#: True is a flag without a value.
NUMBERS = [
    "-1",
    "0",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "",
    "two",
    "٣",
    "0x10",
    "1_0",
    "9" * 30,
    str(2**31),
    str(2**63),
]
PATHS = [
    "",
    " ",
    "HERE/none",
    "HERE/texts.jsonl",
    "/dev/null",
    "HERE",
    "HERE/empty",
    "a\udcff",
    "x" * 300,
    "HERE/model/..",
]
FLAGS: dict[str, tuple[list, list]] = {
    "model": (["HERE/llama", "HERE/tied", "HERE/experts"], [*PATHS, "HERE/llama/config.json"]),
    "init": ([True], []),
    "tokenizer": (["HERE/tokenizer"], PATHS),
    "train_data": (
        [
            "HERE/plain",
            "HERE/packed",
            "HERE/plain:0.7 HERE/packed:0.3",
            "HERE/texts.jsonl",
            "HERE/plain/part-00000.parquet",
        ],
        [
            *PATHS,
            "HERE/plain:0",
            "HERE/plain:-1",
            "HERE/plain:nan HERE/packed",
            "HERE/plain@v3",
            "HERE/plain HERE/plain",
            ":",
        ],
    ),
    "eval_data": (["HERE/plain", "HERE/texts.jsonl"], [*PATHS, "HERE/plain HERE/packed"]),
    "output_dir": (
        ["OUT/model"],
        ["", "/dev/null/x", "HERE/llama/config.json", "OUT/run/step-1", "OUT/run", "x" * 300, "a\udcff"],
    ),
    "register_model": (["a.b.c"], ["", "a.b", "a.b.c.d", "a/b", "x" * 300]),
    "overwrite": ([True], []),
    "lora_dim": (["2", "0"], [*NUMBERS, "1000"]),
    "lora_alpha": (["4"], NUMBERS),
    "lora_module_name": (["q_proj", "q_proj,v_proj"], ["", ",", "nothing", "lm_head", "(", "norm"]),
    "lora_dropout": (["0.1", "0"], [*NUMBERS, "1"]),
    "use_rslora": ([True], []),
    "use_dora": ([True], []),
    "load_in_4bit": ([True], []),
    "adapter_name_or_path": ([], PATHS),
    "freeze": (["embed_tokens", r"layers\.[01]\.,norm"], ["", "(", "[", ",", "nothing", ".*"]),
    "objective": (["lm"], ["", "dpo", "DPO"]),
    "dpo_beta": (["0.1"], NUMBERS),
    "dpo_length_normalized": ([True], []),
    "dpo_sft_weight": (["0"], NUMBERS),
    "seq_len": (["16", "64", "17"], NUMBERS),
    "pack": (["cut", "best-fit"], ["", "Cut", "1"]),
    "ragged": ([True], []),
    "shuffle_lanes": (["1", "7"], NUMBERS),
    "blend_end": (["drop"], ["stop"]),
    "per_device_train_batch_size": (["1", "3"], NUMBERS),
    "gradient_accumulation_steps": (["2", "5"], NUMBERS),
    "num_train_epochs": (["0", "0.5", "2"], NUMBERS),
    "max_steps": (["0", "1"], ["1.5", "", "two", "-7"]),
    "learning_rate": (["1e-3", "0", "1e30"], NUMBERS),
    "min_learning_rate": (["1e-5"], NUMBERS),
    "lr_scheduler_type": (["linear", "constant", "wsd"], ["", "step"]),
    "decay_ratio": (["0", "1"], [*NUMBERS, "1.01"]),
    "warmup_steps": (["3"], NUMBERS),
    "weight_decay": (["0"], NUMBERS),
    "adam_beta1": (["0"], NUMBERS),
    "adam_beta2": (["0.5"], NUMBERS),
    "adam_epsilon": (["1e-30", "1e-3"], NUMBERS),
    "max_grad_norm": (["0", "0.1"], NUMBERS),
    "max_skipped_steps": (["1"], NUMBERS),
    "dtype": (["fp32", "bf16", "fp16"], ["float32", ""]),
    "attention": (["reference", "cpu"], ["cuda", "npu", "flash_attention_2", "sdpa"]),
    "fused_ops": (["none"], ["all"]),
    "zero_stage": (["0", "1"], ["2", "-1", "01"]),
    "offload_optimizer": ([True], []),
    "seed": (["5", str(2**31)], NUMBERS),
    "layout": (["given"], ["auto", ""]),
    "hardware": (["conf/hardware/8xh100-80g-sxm.yaml"], PATHS),
    "tokens_per_step": (["64", "4096"], NUMBERS),
    "pipe_parallel_size": (["1"], [*NUMBERS, "2"]),
    "model_parallel_size": (["1"], [*NUMBERS, "2"]),
    "sequence_parallel_size": (["1"], [*NUMBERS, "2"]),
    "expert_parallel_size": (["1"], [*NUMBERS, "2"]),
    "ulysses_degree": (["1"], [*NUMBERS, "2"]),
    "encoder_pipe_parallel_size": (["0"], NUMBERS),
    "partition_method": (["mem", "parameters", "uniform", "6"], ["", ",", "5", "3,3", "0", "-1", "1e3", "best", "6,0"]),
    "split_dlayer": ([True], []),
    "checkpoint_grad_interval": (["1", "3"], NUMBERS),
    "checkpoint_grad_selective": ([True], []),
    "compile": ([True], []),
    "dry_run": ([True], []),
    "ranks": (["1", "2"], NUMBERS),
    "device_memory": (["80"], NUMBERS),
    "image_tokens": (["0.5"], NUMBERS),
    "eval_steps": (["1"], NUMBERS),
    "sample_prompts": (["HERE/prompts.jsonl"], PATHS),
    "early_stop_patience": (["1"], NUMBERS),
    "timeout": (["5", "600"], NUMBERS),
    "logging_steps": (["1"], NUMBERS),
    "show_first": ([True], []),
    "checkpoint": (["OUT/run"], ["", "/dev/null/x", "HERE/llama/config.json", "HERE/run/step-1", "x" * 300]),
    "upload": (["OUT/mirror"], ["", "/dev/null/x", "HERE/llama/config.json", "OUT/run", "nosuch://a/b", "x" * 300]),
    "save_steps": (["1"], NUMBERS),
    "only_ckpt_model": ([True], []),
    "max_num_checkpoints": (["1"], NUMBERS),
    "best_of": (["1"], NUMBERS),
    "background_executor": (["none", "process"], ["fork"]),
    "resume": (["auto"], ["", "latest", "best", "step-1", "../run", "newest"]),
    "from_ckpt": (["HERE/run"], [*PATHS, "HERE/run/step-1"]),
    "tag": (["step-1", "best", "latest"], ["", "step-9", "..", "/", "step-1/", "x" * 300]),
}

#: What a settings file may hold besides: most of it wrong.
LINES = [
    "",
    "# nothing",
    "seq_length: 64",
    "Seq_len: 64",
    "seq_len: 64\nseq_len: 16",
    "model:\n  name: llama",
    "train_data: [a, b]",
    "train_data:\n- a\n- b",
    "learning_rate: {peak: 1.0}",
    "1: 2",
    "null: 1",
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    "true: false",
    "2020-01-01: 1",
    "seed: 2020-13-45",
    "seed: 2020-01-02",
    "seed: !!int abc",
    "seed: !!python/object/apply:os.getcwd []",
    "seed: !!binary aGVsbG8=",
    "tokenizer: !!binary aGVsbG8=",
    "tokenizer: !!set {a, b}",
    "tokenizer: 2020-01-02 03:04:05",
    "tokenizer: 007",
    "tokenizer: 12:30:45",
    "tokenizer: no",
    "tokenizer: ~",
    "split_dlayer: yes",
    "split_dlayer: 'yes'",
    "split_dlayer: 1",
    "split_dlayer:",
    "seed: 0o10",
    "seed: 010",
    "seed: 1:30",
    "seed: 1_000",
    "seed: 0b11",
    "seed: '5'",
    "seed: 5.0",
    "seed: " + "9" * 5000,
    "seed: !!float 1",
    "seed: !!bool x",
    "seed: !!timestamp x",
    "dtype: FP32",
    "dtype: bf16 ",
    "ragged: on",
    "zero_stage: 1",
    "adam_epsilon: 1e-6",
    "adam_epsilon: .inf",
    "adam_epsilon: .nan",
    "adam_epsilon: -0.0",
    "<<: {seed: 3}",
    "<<: 1",
    "a: &a [*a]",
    "seed: *nobody",
    "seed: &s 4\nmax_skipped_steps: *s",
    "---\nseed: 4",
    "...\n---\n",
    "- 1",
    "just words",
    "{seed: 4}",
    "\tseed: 4",
    "seed: [" * 2000,
    "seed: 'unfinished",
    'seed: "\\0"',
    'tokenizer: "\\0"',
    'output_dir: "a\\0b"',
    'freeze: "a\\nb"',
    'model: "a\\nb"',
    "seed: |\n  4",
    "seed: 4 # four",
    "seed : 4",
    "'seed': 4",
    "%YAML 1.2\n---\nseed: 4",
    "\ufeffseed: 4",
    "\x07: 1",
    "config: other.yaml",
    "local_rank: 0",
    "deepspeed: true",
    "help: true",
    "seed",
    "=: 1",
    "seed: =",
]


@st.composite
def commands(draw) -> tuple[dict, set[str], list[str]]:
    """Flags, of which one at most is wrong; those that stand in a file, now and then all; and what else is in it."""
    names = draw(st.lists(st.sampled_from(sorted(FLAGS)), unique=True, max_size=6))
    wrong = draw(st.sampled_from([*names, *[None] * 6]))
    given = {name: draw(st.sampled_from(FLAGS[name][name == wrong] or FLAGS[name][name != wrong])) for name in names}
    filed = draw(st.sampled_from([set(), set(names[::2]), set(FLAGS)]))
    lines = draw(st.lists(st.sampled_from(LINES), max_size=2)) if filed and draw(st.integers(0, 2)) == 0 else []
    return given, filed, lines


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Models, a tokenizer, tables, texts, and a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("here")
    save_tokenizer(train_tokenizer(["ab"], 258), folder / "tokenizer")
    for name, config in MODELS.items():
        write_random_model(AutoConfig.for_model(**SMALL | {"vocab_size": 300} | config), folder / name, 0)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, rng.integers(1, 90)).astype(np.int32) for _ in range(40)]
    write_table(folder / "plain", rows)
    bounds = [[0, len(row) // 2, len(row)] if len(row) > 1 else [0, 1] for row in rows]
    write_table(folder / "packed", rows, labels=[row.tolist() for row in rows], cu_seqlens=bounds)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "ab ab"}))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": "ab " * n}) + "\n" for n in range(1, 40)))
    (folder / "empty").mkdir()
    done = run_ranks(1, *words({**BASE, "eval_data": "HERE/plain", "save_steps": "1"}, folder, folder))
    assert done.returncode == 0, done.stderr
    return folder


#: What every command has, unless it says otherwise.
BASE = {
    **{"model": "HERE/llama", "train_data": "HERE/plain", "tokenizer": "HERE/tokenizer", "seq_len": "32"},
    **{"max_steps": "1", "dtype": "fp32", "checkpoint": "OUT/run"},
}
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}


def words(given: dict, here: Path, out: Path) -> list[str]:
    """Flags of a command line."""
    listed = [[f"--{name}"] if value is True else [f"--{name}", value] for name, value in given.items()]
    return [word.replace("HERE", str(here)).replace("OUT", str(out)) for flag in listed for word in flag]


def settings_file(given: dict, lines: list[str], here: Path, out: Path) -> str:
    """The same as a settings file, as a person writes it, and then some."""
    plain = [f"{name}: {'true' if value is True else value}" for name, value in given.items()]
    return "\n".join([*plain, *lines]).replace("HERE", str(here)).replace("OUT", str(out)) + "\n"


def command(given: dict, filed: set[str], lines: list[str], here: Path, out: Path) -> list[str]:
    """The command line, and the file that it names written."""
    if given.get("init"):
        given = {"learning_rate": "0", "output_dir": "OUT/model", **given}  # what is written is then what it began with
    whole = {**BASE, **given}
    if "from_ckpt" in given and "model" not in given:
        whole.pop("model")
    argv = words({name: value for name, value in whole.items() if name not in filed}, here, out)
    if not filed and not lines:
        return argv
    text = settings_file({n: v for n, v in whole.items() if n in filed}, lines, here, out)
    (out / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    return [*argv, "--config", str(out / "mine.yaml")]


def check_losses(args: TrainArguments) -> None:
    """The first loss, and the first of the held-out rows, are those of transformers."""
    if args.dry_run or not args.checkpoint or (args.init and args.learning_rate):
        return
    told = Path(args.checkpoint) / "metrics.jsonl"  # none where there was nothing to tell
    numbers = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    plan = plan_run(replace(args, output_dir=None, resume="auto"), 1)  # texts were tokenized into the run's folder
    start, tolerance = args.output_dir if args.init else start_of(args), TOLERANCE[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    with torch.no_grad():
        evaluated = [number["eval_loss"] for number in numbers if "eval_loss" in number]
        if evaluated:
            assert evaluated[0] == pytest.approx(mean_loss(model, plan.evaluation), rel=tolerance)
        losses = [number["loss"] for number in numbers if "loss" in number]
        assert len(losses) == plan.total_steps
        if losses:
            batches = step_batches(plan.train, batch_plan(args, plan.mesh, 0), 0, plan.total_samples)
            sums = [(float(document_losses(model, batch)[0]), batch.trained) for batch in batches]
            expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
            assert losses[0] == pytest.approx(expected, rel=tolerance)
            event(f"trained in {args.dtype}")


def check_sentence(said: str) -> None:
    """One line, that can be printed."""
    note(said)
    assert len(said.splitlines()) == 1, said
    assert said.endswith((".", "?")) or "--help lists" in said, said
    assert said.isprintable(), repr(said)
    assert len(said) < 1500, said
    event(f"refused: {re.sub('[^ ]*/[^ ]*|[0-9.e+-]{3,}', '_', said)[:50]}")


def test_every_flag_has_values_to_be_tried_with():
    assert set(FLAGS) == {spec.name for spec in fields(TrainArguments)}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=commands())
def test_a_command_is_refused_by_a_sentence_or_trains_as_transformers_does(drawn, here, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    look_at(command(*drawn, here, out))
    shutil.rmtree(out)


def look_at(argv: list[str]) -> None:
    """What a command does, in a process of its own where its flags are understood."""
    note(f"{argv}")
    try:
        args = parse_arguments(argv)
    except UserError as error:
        check_sentence(str(error))
        return
    done = run_ranks(1, *argv, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    if not done.returncode:
        check_losses(args)
        return
    if done.returncode == 1 and args.dry_run and args.device_memory:
        return  # the table is printed, and does not fit
    assert done.returncode == 2, done.stderr[-3000:]
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, done.stderr
    assert done.stderr.rstrip().endswith(sentences[0])
    check_sentence(sentences[0])
