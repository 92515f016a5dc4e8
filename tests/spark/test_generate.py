"""Generation on real Spark: the same rows however tasks are dealt, whatever dies, on Spark, a cluster and Sail."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of

from examples.inputs import CHATML, SPECIAL
from fft.data.manifest import read_manifest
from fft.errors import UserError
from fft.quickstart.tokenizer import train_tokenizer
from spark.helpers import rows_of
from spark_jobs import generate, generate_table, tokenize_table
from spark_jobs.token_table.kept import waiting

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
#: The environment of `make env-serve`: continuous integration has one.
SERVE = Path(os.environ.get("FFT_VENV_SERVE", ROOT / ".venv-serve")) / "bin" / "python"
WORDS = ["def f(x):", "return x", "import os", "class A:", "pass", "for i in range(3):", "print(i)"]
SHORT = {"max_new_tokens": 4, "temperature": 0.8, "batch_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A chat model that knows nothing."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = train_tokenizer(WORDS * 5, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": SPECIAL[1]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """500 prompts of mixed lengths, a tenth of them without ids."""
    path, rng = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(500)]
    rows = [{"id": None if i % 10 == 0 else f"p{i}", "prompt": text, "level": i} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def answers(spark, prompts, model, tmp_path_factory) -> Path:
    """Made by one task."""
    out = tmp_path_factory.mktemp("answers") / "out"
    manifest = generate_table(prompts, out, model, engine="transformers", **SHORT)
    counts = manifest.lineage["counts"]
    assert (counts["prompts_in"], counts["rows"], counts["engine_starts"]) == (500, 500, 1)
    return out


def start(job: tuple[Path, Path, Path], *flags: object, failures: int = 4, **environment: str) -> subprocess.Popen:
    """The command for prompts, output and model, with two tasks at once, each of which may fail so many times."""
    prompts, out, model = job
    settings = [f"--{name}={value}" for name, value in SHORT.items()]
    command = [ROOT / "spark_jobs/generate.py", "-i", prompts, "-o", out, "--model", model, *settings, *flags]
    variables = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable, **environment}
    variables["PYSPARK_SUBMIT_ARGS"] = f"--master local[2,{failures}] --conf spark.ui.enabled=false pyspark-shell"
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return said


def processes() -> dict[int, tuple[int, int, str]]:
    """Parent, session and command of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(path.name)] = int(fields[1]), int(fields[3]), command
    return found


def workers(session: int) -> list[int]:
    """Python workers of a session: children of Spark's daemon, which are forks of it."""
    every = processes()
    daemons = {pid for pid, (_, own, command) in every.items() if own == session and "pyspark.daemon" in command}
    return [pid for pid in daemons if every[pid][0] in daemons]


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def kill_a_worker(process: subprocess.Popen, out: Path) -> None:
    """Once the first part is finished, while others are not."""
    deadline = time.monotonic() + 600
    while not sum(waiting(out).values()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(max(workers(process.pid), key=memory), signal.SIGKILL)  # one with an engine; others may be idle


def same_rows(ours: Path, theirs: Path) -> bool:
    return sorted(rows_of(ours), key=repr) == sorted(rows_of(theirs), key=repr)


def check_nothing_left(out: Path, session: int) -> None:
    """Neither hidden files nor processes, those of engines among them."""
    names = {file.path for file in read_manifest(out).files}
    assert {path.name for path in out.iterdir()} == names | {"_fft_manifest.json"}
    deadline = time.monotonic() + 300
    while left := [command for _, own, command in processes().values() if own == session]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.thorough
def test_a_worker_that_dies_for_good_ends_the_job_with_a_sentence_and_the_command_goes_on(
    prompts, answers, model, tmp_path
):
    """Another command, with another seed, is refused."""
    out = tmp_path / "out"
    process = start((prompts, out, model), "--engine", "transformers", failures=1)
    kill_a_worker(process, out)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 2
    assert "error: a Python worker of Spark has ended" in said.splitlines()[-1]
    (finished,) = waiting(out).values()
    assert 0 < finished < 8
    with pytest.raises(UserError, match=f"holds {finished} finished parts of another generation"):
        generate_table(prompts, out, model, engine="transformers", **{**SHORT, "seed": 1})
    manifest = generate_table(prompts, out, model, engine="transformers", **SHORT)
    assert manifest.lineage["counts"]["engine_starts"] in (1, 2)  # there may be one of an earlier job
    assert same_rows(out, answers)
    check_nothing_left(out, process.pid)


def test_sail_makes_the_same_rows(prompts, answers, model, tmp_path):
    """In its server's own process and Python, so with the engine that is installed there."""
    process = start((prompts, tmp_path / "out", model), "--engine", "transformers", FFT_ENGINE="sail")
    finish(process)
    assert same_rows(tmp_path / "out", answers)
    check_nothing_left(tmp_path / "out", process.pid)


@pytest.mark.vllm
@pytest.mark.skipif(not SERVE.exists(), reason="make env-serve makes the environment with vLLM")
def test_vllm_in_an_environment_of_the_workers(prompts, model, tmp_path):
    """500 prompts by two engines, one of which is killed with its worker, and by one engine: the same rows."""
    # Few at a time, so that the parts of a task are finished one after the other.
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
    flags = ["--engine", "vllm", "--max_new_tokens", 8, "--engine_args", json.dumps(arguments)]
    # Engines inside the workers start in half the time; that vLLM's own processes end is tried in tests/serve.
    python = {"PYSPARK_PYTHON": str(SERVE), "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    one, two = tmp_path / "one", tmp_path / "two"
    process = start((prompts, two, model), *flags, "--num_engine", 2, **python)
    kill_a_worker(process, two)
    finish(process)
    check_nothing_left(two, process.pid)
    process = start((prompts, one, model), *flags, **python)
    finish(process)
    assert same_rows(one, two)
    assert [row["level"] for row in rows_of(two)] == list(range(500))
    facts = [read_manifest(out).lineage for out in (one, two)]
    assert [lineage["engine"] for lineage in facts] == ["vllm", "vllm"]
    assert facts[0]["counts"]["engine_starts"] == 1
    assert facts[1]["counts"]["engine_starts"] in (2, 3)


def test_a_dataframe_of_answers(spark, answers, prompts, model, tmp_path):
    """Another partitioning, and rows of Spark's own reader."""
    rows = spark.read.json(str(prompts)).where("id is not null")
    found = generate(rows.repartition(3), model=model, engine="transformers", **SHORT)
    assert found.columns == ["id", "level", "prompt", "messages", "text", "finish_reason", "tokens", "sample"]
    ours = {row.id: row.text for row in found.collect()}
    assert ours == {row["id"]: row["text"] for row in rows_of(answers) if row["id"] is not None}
    bad = spark.createDataFrame([("a", "Hi"), ("b", None)], "id string, prompt string")
    told = generate(bad, model=model, engine="transformers", on_error="quarantine", **SHORT).collect()
    assert [(row.id, row.error) for row in sorted(told)] == [("a", None), ("b", "prompt is null or missing")]
    table = generate_table([rows, prompts], tmp_path / "both", model, engine="transformers", **SHORT)
    assert table.rows == 950
    assert Counter(row["text"] for row in rows_of(tmp_path / "both") if row["id"] == "p1") == {ours["p1"]: 2}


def test_samples_are_trained_on(spark, model, tmp_path):
    """Generate, keep what a check accepts, tokenize: one lake."""
    source = tmp_path / "p.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"What is {i}?"} for i in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "prompt": 7}]))
    settings = {"engine": "transformers", "n": 4, "temperature": 1.0, "max_new_tokens": 4, "batch_size": 64}
    out = tmp_path / "samples"
    manifest = generate_table(source, out, model, on_error="quarantine", format="delta", **settings)
    assert (manifest.rows, manifest.lineage["counts"]["quarantined"]) == (80, 1)
    again = [generate_table(source, tmp_path / str(i), model, on_error="quarantine", **settings) for i in range(3)]
    assert sum(one.lineage["counts"]["engine_starts"] for one in again) <= 2  # a worker keeps its engine; there are two
    (aside,) = (out / "_quarantine").iterdir()
    assert json.loads(aside.read_text())["file"] == f"{source}, line 21"
    files = [str(out / file.path) for file in manifest.files]
    kept = spark.read.parquet(*files).where("length(text) % 2 = 0")
    count = kept.count()
    assert 0 < count < 80
    tokens = tokenize_table(kept, tmp_path / "tokens", model, task="chat")
    assert tokens.lineage["counts"]["documents_out"] == count
    assert tokens.lineage["counts"]["trained_tokens"] > count
    trained = pq.read_table(tmp_path / "tokens" / tokens.files[0].path).to_pylist()
    assert {row["doc_ids"][0] for row in trained} <= {f"p{i}" for i in range(20)}


def test_prompts_with_images_are_answered_and_train(spark, tmp_path):
    """In every form; what comes out has marks and a column of images, which the chat task takes."""
    model, made = make_vision_model(tmp_path / "model", "qwen2_vl"), pictures(6)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, data in enumerate(made):
        (folder / f"{number}.png").write_bytes(data)
    forms, meant = prompts_of(made)
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": str(i)} | form) + "\n" for i, form in enumerate(forms))
    )
    settings = {"image_path": folder, "engine": "transformers", "max_new_tokens": 12}
    manifest = generate_table(tmp_path / "in.jsonl", tmp_path / "out", model, **settings)
    assert manifest.lineage["counts"]["prompts_in"] == len(forms) == manifest.rows
    rows = sorted(rows_of(tmp_path / "out"), key=lambda row: int(row["id"]))
    assert [row["text"] for row in rows] == answers_of_transformers(model, meant)
    for row, (messages, images) in zip(rows, meant, strict=True):
        held = [image["bytes"] or (folder / image["path"]).read_bytes() for image in row["images"] or ()]
        assert held == images
        marks = sum(turn["content"].count("<image>") for turn in row["messages"])
        assert (marks, len(row["messages"])) == (len(images), len(messages) + (messages[-1]["role"] == "user"))
    tokenized = tokenize_table(tmp_path / "out", tmp_path / "table", model, task="chat", image_path=folder)
    assert tokenized.lineage["counts"]["documents_out"] == len(forms)

    table = pa.table({"prompt": ["<image> a", "b"], "image": [{"bytes": made[2], "path": "x"}, None]})
    pq.write_table(table, tmp_path / "in.parquet")
    answered = generate(spark.read.parquet(str(tmp_path / "in.parquet")), model=str(model), **settings).collect()
    assert [row["messages"][0]["content"] for row in answered] == ["<image> a", "b"]
    assert [row["images"] and bytes(row["images"][0]["bytes"]) for row in answered] == [made[2], None]
    with pytest.raises(UserError, match=r"line 1: the content of turn 1 \(user\) is list, not a string"):
        generate_table(tmp_path / "in.jsonl", tmp_path / "other", model, engine="transformers")
    with pytest.raises(UserError, match="`max_tiles` is a limit of images"):
        generate_table(tmp_path / "in.jsonl", tmp_path / "other", model, max_tiles=2)
