"""Generation inside Spark beside the engine that it drives: tokens a second of ``generate_table`` and of vLLM's own
``LLM.generate`` on the same prompts, in turn, both engines started before the clock.

    .venv/bin/python -m benchmarks.generate [--python .venv-serve/bin/python] [--prompts 500] [--rounds 3]

Spark's side reads the prompts' file, deals parts to a task, moves rows between Java and Python, and writes a finished
table with its manifest; the peer, in a process of the same environment as Spark's workers, is given texts and gives
back objects. Both give the same answers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from benchmarks.serve import make_model, mixed_prompts, peer
from fft.console import format_table, say
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import check_model
from fft.serve.sampling import Sampling

#: Of both engines. Nothing is kept from one round to the next.
_ARGUMENTS = {"enforce_eager": True, "kv_cache_memory_bytes": 512 << 20, "enable_prefix_caching": False}
_LIMIT, _VOCABULARY = 1024, 4096
#: Of each answer, a token in forty ends it.
_SAMPLING = Sampling(128, temperature=1.0, stop_token_ids=tuple(range(1, _VOCABULARY, 40)))


def answer_rounds(model: str, count: int) -> None:
    """The peer's process: a round for each line that comes in, told as a line of JSON."""
    from vllm import LLM

    prompts, checked = mixed_prompts(count), check_model(model, EngineOptions("vllm", max_model_len=_LIMIT))
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=_LIMIT,
        disable_log_stats=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        **_ARGUMENTS,
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        found = peer(llm, checked, prompts, _SAMPLING)
        print(json.dumps([found.seconds, found.tokens, list(found.texts)]), flush=True)
    llm.llm_engine.engine_core.shutdown()


def spark_round(source: Path, model: Path, output: Path) -> tuple[float, int, list[str]]:
    """The same by the job; the engine is there after the first."""
    from spark_jobs import generate_table

    settings: dict[str, Any] = {name: getattr(_SAMPLING, name) for name in ("max_new_tokens", "temperature")}
    begin = time.perf_counter()
    manifest = generate_table(
        source,
        output,
        model,
        overwrite=True,
        engine="vllm",
        max_model_len=_LIMIT,
        engine_args=_ARGUMENTS,
        stop_token_ids=_SAMPLING.stop_token_ids,
        **settings,
    )
    seconds = time.perf_counter() - begin
    texts = [row for file in manifest.files for row in pq.read_table(output / file.path).column("text").to_pylist()]
    return seconds, manifest.tokens, texts


def main() -> None:
    """Start both, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-serve/bin/python", help="the workers', with vLLM")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides each")
    parser.add_argument("--peer", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
    if args.peer is not None:
        answer_rounds(args.peer, args.prompts)
        return
    os.environ["PYSPARK_PYTHON"] = str(Path(args.python).absolute())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, source = folder / "model", folder / "in.jsonl"
        make_model(model)
        rows = [{"id": str(row), "prompt": prompt} for row, prompt in enumerate(mixed_prompts(args.prompts))]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [os.environ["PYSPARK_PYTHON"], "-m", "benchmarks.generate", "--peer", str(model)]
        other = subprocess.Popen(
            [*command, "--prompts", str(args.prompts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with other:
            if other.stdin is None or other.stdout is None:
                raise RuntimeError("the peer has no pipes")
            while other.stdout.readline().strip() != "ready":
                if other.poll() is not None:
                    raise RuntimeError("the peer did not start")
            turns: dict[str, list[tuple[float, int, list[str]]]] = {"LLM.generate": [], "generate_table": []}
            for _ in range(args.rounds + 1):  # the first is to start and to warm up
                other.stdin.write("go\n")
                other.stdin.flush()
                turns["LLM.generate"].append(json.loads(other.stdout.readline()))
                turns["generate_table"].append(spark_round(source, model, folder / "out"))
            other.stdin.close()
        report({name: rounds[1:] for name, rounds in turns.items()})


def report(turns: dict[str, list[tuple[float, int, list[str]]]]) -> None:
    """Medians, and the ratio of each round."""
    rates = {name: [tokens / seconds for seconds, tokens, _ in rounds] for name, rounds in turns.items()}
    rows = [[name, median(rates[name]), median(one[0] for one in rounds)] for name, rounds in turns.items()]
    say("")
    print(format_table(("side", "tokens/s", "seconds"), rows))
    pairs = [a / b for a, b in zip(rates["generate_table"], rates["LLM.generate"], strict=True)]
    print(f"generate_table / LLM.generate: {', '.join(f'{pair:.3f}' for pair in pairs)}")
    mine, theirs = turns["generate_table"][0][2], turns["LLM.generate"][0][2]
    print(f"same texts: {sum(a == b for a, b in zip(mine, theirs, strict=True))} of {len(mine)}")


if __name__ == "__main__":
    main()
