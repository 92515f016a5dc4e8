"""Batch inference beside the engine that it drives: tokens a second of ``fft.serve.batch_infer`` and of vLLM's own
``LLM.generate`` on the same prompts, in turn, both loaded before the clock starts.

    .venv-serve/bin/python -m benchmarks.serve [--model DIR] [--prompts 500] [--rounds 4]

The product reads, checks and tokenizes its input file and writes its output; the peer is given texts and gives back
objects. Prompts and answers are of mixed lengths, and both sides give the same answers. Without ``--model``, a Llama of
random weights is made.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.corpus import source_texts
from fft.console import format_table, say
from fft.data.known import LeftOut
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve.asked import Reading
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import CheckedModel, check_model
from fft.serve.engines.choice import start_engine
from fft.serve.engines.texts import decode_answer
from fft.serve.engines.vllm_engine import VllmEngine
from fft.serve.inputs import find_inputs
from fft.serve.outputs import Partial
from fft.serve.prompts import Renderer
from fft.serve.rows import Facts, PromptRows
from fft.serve.sampling import Sampling, row_seed
from fft.serve.window import Question, answers

#: Of both engines.
_ARGUMENTS = {
    **{"enforce_eager": True, "kv_cache_memory_bytes": 512 << 20},
    **{"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
}
_VOCABULARY, _LIMIT = 4096, 1024


@dataclass(frozen=True)
class Round:
    """What a side took: seconds until the first row was there, and until all were; CPU seconds of all processes."""

    first: float
    cpu: float
    seconds: float
    tokens: int
    texts: tuple[str, ...]


def source_characters(count: int) -> list[str]:
    """Texts of so many characters, or a little more."""
    found, size = [], 0
    for _, text in source_texts():
        found.append(text)
        size += len(text)
        if size >= count:
            break
    return found


def make_model(folder: Path) -> None:
    """A Llama of 4 layers of 256 with a tokenizer of its own."""
    tokenizer = train_tokenizer(source_characters(2 << 20), _VOCABULARY)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def mixed_prompts(count: int) -> list[str]:
    """Prompts of 20 to 1,500 characters, the same at every call."""
    text = "".join(source_characters(1500 * count))
    lengths = [20 + row_seed(0, row) % 1480 for row in range(count)]
    return [text[row * 1500 : row * 1500 + length] for row, length in enumerate(lengths)]


def cpu_seconds() -> float:
    """Of this process and all below it; of two engines, only one works at a time."""
    mine = psutil.Process()
    times = [process.cpu_times() for process in (mine, *mine.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def product(engine: VllmEngine, model: CheckedModel, source: Path, sampling: Sampling, folder: Path) -> Round:
    """From the file of prompts to the file of answers, as the command goes."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    rows = PromptRows(
        find_inputs([str(source)], LeftOut()), Reading("prompt", sampling), Renderer.of(model.tokenizer, _LIMIT), False
    )
    facts = Facts()
    rows.check(facts, typed=False)
    partial = Partial(folder / "out.jsonl", {"input": facts.sha256}, resume=False)
    first, tokens, texts = 0.0, 0, []
    questions = (Question(row, row.number, row.ids, sampling) for row in rows.read())
    for question, completions in answers(engine, questions):
        partial.add(question.item.line(completions))
        first = first or time.perf_counter() - begin
        tokens += sum(one.tokens for one in completions)
        texts += [one.text for one in completions]
    partial.become_lines()
    seconds = time.perf_counter() - begin
    return Round(first, cpu_seconds() - cpu, seconds, tokens, tuple(texts))


def peer(llm: Any, model: CheckedModel, prompts: Sequence[str], sampling: Sampling) -> Round:
    """``LLM.generate``, told the same of every prompt."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=row_seed(sampling.seed, row),
            stop_token_ids=[*sampling.stop_token_ids, *model.ends],
        )
        for row in range(len(prompts))
    ]
    begin, cpu = time.perf_counter(), cpu_seconds()
    outputs = [output.outputs[0] for output in llm.generate(list(prompts), parameters, use_tqdm=False)]
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    # vLLM's text lacks the beginning of a character with which an answer ends.
    kept = [list(one.token_ids)[: -1 if one.finish_reason == "stop" else None] for one in outputs]
    pairs = zip((model.tokenizer(prompt).input_ids for prompt in prompts), kept, strict=True)
    texts = tuple(decode_answer(model.tokenizer, *pair) for pair in pairs)
    return Round(seconds, cpu, seconds, sum(map(len, kept)), texts)


def main() -> None:
    """Load both, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4, help="of both sides each")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.model is None:
            args.model = folder / "model"
            make_model(args.model)
        prompts = mixed_prompts(args.prompts)
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        # Of each answer, a token in forty ends it.
        sampling = Sampling(128, temperature=1.0, stop_token_ids=tuple(range(1, _VOCABULARY, 40)))
        model = check_model(str(args.model), EngineOptions("vllm", max_model_len=_LIMIT, engine_args=_ARGUMENTS))
        engine = start_engine(model)
        from vllm import LLM

        llm = LLM(str(args.model), dtype="float32", max_model_len=_LIMIT, disable_log_stats=True, **_ARGUMENTS)
        turns: dict[str, list[Round]] = {"LLM.generate": [], "batch_infer": []}
        try:
            for number in range(args.rounds + 1):  # the first is to warm up
                for name in sorted(turns, reverse=bool(number % 2)):  # who begins changes from round to round
                    llm.reset_prefix_cache()
                    engine._engine.reset_prefix_cache()
                    if name == "batch_infer":
                        found = product(engine, model, source, sampling, folder)
                    else:
                        found = peer(llm, model, prompts, sampling)
                    say(
                        f"{name}: {found.tokens:,} tokens in {found.seconds:.1f} s, first row after {found.first:.1f} s"
                    )
                    turns[name].append(found)
        finally:
            engine.close()
            llm.llm_engine.engine_core.shutdown()
        report({name: rounds[1:] for name, rounds in turns.items()})


def report(turns: dict[str, list[Round]]) -> None:
    """Medians, and the ratio of each round's neighbours."""
    rates = {name: [one.tokens / one.seconds for one in rounds] for name, rounds in turns.items()}
    rows = [
        [
            *(name, median(rates[name]), median(one.seconds for one in rounds)),
            *(median(one.first for one in rounds), median(one.tokens / one.cpu for one in rounds)),
        ]
        for name, rounds in turns.items()
    ]
    print(format_table(("side", "tokens/s", "seconds", "first row after s", "tokens/CPU s"), rows))
    pairs = [a / b for a, b in zip(rates["batch_infer"], rates["LLM.generate"], strict=True)]
    print(f"batch_infer / LLM.generate: median {median(pairs):.3f}, each round {', '.join(f'{p:.3f}' for p in pairs)}")
    work = [a.cpu / b.cpu for a, b in zip(turns["batch_infer"], turns["LLM.generate"], strict=True)]
    print(f"CPU seconds, batch_infer / LLM.generate: median {median(work):.3f}")
    mine, theirs = turns["batch_infer"][0].texts, turns["LLM.generate"][0].texts
    print(f"same texts: {sum(a == b for a, b in zip(mine, theirs, strict=True))} of {len(mine)}")


if __name__ == "__main__":
    main()
