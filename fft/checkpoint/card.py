"""The model card of what a run wrote: README.md with the Hub's header, made of facts.

It lies in every checkpoint and model directory. The facts are those of a checkpoint's ``training/state.json``, see
:func:`fft.training.run_folder.state_of`; what they do not say, the card does not say.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from fft.data.manifest import or_unknown
from fft.json_text import small_text
from fft.redaction import harmless, redact
from fft.train_arguments import TrainArguments
from fft.yaml_text import yaml_value

CARD = "README.md"
_TAG = "flash-fine-tuning"
#: What a card takes over from that of the model it began with.
_INHERITED = ("license", "license_name", "license_link", "language")
#: Settings that say where things are or how a run is watched, not what was trained.
_PLACES = {"model", "tokenizer", "train_data", "eval_data", "output_dir", "checkpoint", "upload", "resume", "from_ckpt"}
_PLACES |= {"tag", "overwrite", "dry_run", "ranks", "device_memory", "register_model", "logging_steps", "save_steps"}
_PLACES |= {"max_num_checkpoints", "best_of", "background_executor", "only_ckpt_model", "init", "pipe_parallel_size"}
_PLACES |= {"sample_prompts", "model_parallel_size", "sequence_parallel_size", "expert_parallel_size"}
_PLACES |= {"adapter_name_or_path"}
_LOAD = "\n## Load\n"
#: A folder of the Hub's cache.
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def perplexity(loss: float) -> float:
    """The exponential of a loss; infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def told_loss(args: Mapping[str, Any], loss: float) -> str:
    """A validation loss; of tokens, which a run with these settings learns or not, with its perplexity."""
    return f"{loss:.4f} (perplexity {perplexity(loss):.4g})" if args["objective"] == "lm" else f"{loss:.4f}"


def card_of(state: Mapping[str, Any], model_type: str) -> str:
    """The card of a model of this type or, where the run trained one, of its adapter."""
    state = {**state, "arguments": dataclasses.asdict(TrainArguments()) | state.get("arguments", {})}
    args, sees = state["arguments"], bool(state.get("images"))
    adapter = args["lora_dim"] > 0
    header = _header(state, model_type, adapter, sees)
    what = f"adapter of rank {args['lora_dim']} for a {model_type}" if adapter else model_type
    parts = [f"# {what}, trained to step {state['step']:,}", _facts(state, model_type)]
    if tables := state.get("tables"):
        told = [{**table, "trained": or_unknown(table.get("trained"))} for table in tables]
        rows = [[_shown(table.get(name)) for name in _TABLE] for table in told]
        parts.append("## Data\n\n" + _table(_TABLE, rows))
    parts.append("## Settings that are not the default\n\n" + _table(("setting", "value"), _settings(args)))
    return _written(header, "\n\n".join(parts) + "\n", _load(adapter, sees, _base(state)))


def card_beside(directory: Path) -> str | None:
    """The card of a model that is made of what a directory holds; None where that has no card of ours."""
    try:
        return _converted(small_text(directory / CARD))
    except (OSError, ValueError):
        return None


def _converted(card: str) -> str | None:
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    try:
        facts = yaml_value(header)
    except ValueError:
        return None
    if not card.startswith("---\n") or not isinstance(facts, dict) or not isinstance(facts.get("tags"), list):
        return None
    if _TAG not in facts["tags"]:
        return None
    if facts.get("library_name") == "peft":
        facts |= {"library_name": "transformers", "base_model_relation": "finetune"}
        facts["tags"] = [*(tag for tag in facts["tags"] if tag != "lora"), "merged"]
        body = body.replace("\n# adapter of rank", "\n# merged adapter of rank", 1)
    sees = facts.get("pipeline_tag") == "image-text-to-text"
    return _written(facts, body.partition(_LOAD)[0].lstrip("\n") + "\n", _load(False, sees, None))


def _written(header: Mapping[str, Any], body: str, load: str) -> str:
    told = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
    return redact(f"---\n{told}---\n\n{body.rstrip()}\n{_LOAD}\n{load}")


def _header(state: Mapping[str, Any], model_type: str, adapter: bool, sees: bool) -> dict[str, Any]:
    base, tables = _base(state), state.get("tables") or ()
    header: dict[str, Any] = {}
    if base is not None:
        header |= {"base_model": _id(base), "base_model_relation": "adapter" if adapter else "finetune"}
        header |= _inherited(Path(base))
    if datasets := list(dict.fromkeys(_id(table["table"]) for table in tables if table["use"] == "train")):
        header["datasets"] = datasets
    task = "image-text-to-text" if sees else "text-generation"
    header |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    header["tags"] = [_TAG, model_type, *["lora"] * adapter]
    if (loss := state.get("eval_loss")) is not None and (held := [t for t in tables if t["use"] == "eval"]):
        name = _id(held[0]["table"])
        found = {"loss": loss} | ({"perplexity": perplexity(loss)} if state["arguments"]["objective"] == "lm" else {})
        metrics = [{"type": kind, "value": value} for kind, value in found.items()]
        result = {"task": {"type": task}, "dataset": {"name": name, "type": name}, "metrics": metrics}
        header["model-index"] = [{"name": f"{model_type}-step-{state['step']}", "results": [result]}]
    return header


def _facts(state: Mapping[str, Any], model_type: str) -> str:
    args, progress, base = state["arguments"], state.get("progress") or {}, _base(state)
    start = f"random weights, seed {args['seed']}" if base is None else f"`{base}`"
    held = ", below the adapter in four bits (NF4)" if args["load_in_4bit"] else ""
    rows = [["model", f"{model_type}, {args['dtype']}{held}"], ["began with", start]]
    if args["adapter_name_or_path"]:
        rows[-1][-1] += f" and the adapter `{args['adapter_name_or_path']}`"
    if batch := state.get("global_batch"):
        tokens, most = batch * args["seq_len"], "at most " if args["ragged"] else ""
        rows.append(["steps", f"{state['step']:,} of {most}{tokens:,} tokens each, {state['step'] * tokens:,} in all"])
    if (loss := progress.get("loss")) is not None:
        rows.append(["training loss", f"{loss:.4f}"])
    if (loss := state.get("eval_loss")) is not None:
        rows.append(["validation loss", told_loss(args, loss)])
    if progress.get("best") is not None:
        step, loss = progress["best"]
        rows.append(["lowest validation loss", f"{loss:.4f} at step {step:,}"])
    if progress.get("seconds"):
        rate = progress["tokens"] / progress["seconds"]
        rows.append(["time of its steps", f"{progress['seconds']:,.0f} s, {rate:,.0f} tokens/s"])
    for name, joint in (("layout", " x "), ("versions", ", ")):
        if state.get(name):
            rows.append([name, joint.join(f"{part} {value}" for part, value in state[name].items())])
    return _table(("", ""), rows)


_TABLE = ("use", "table", "version", "fingerprint", "rows", "tokens", "trained")


def _settings(args: Mapping[str, Any]) -> Iterator[list[str]]:
    for field in dataclasses.fields(TrainArguments):
        if field.name not in _PLACES and args.get(field.name, field.default) != field.default:
            yield [f"--{field.name}", str(args[field.name])]


def _load(adapter: bool, sees: bool, base: str | None) -> str:
    """How to load it and to go on; DIR is where the card lies."""
    if adapter:
        python = 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("DIR")'
        more = [f"python -m fft.checkpoint.convert {base} MERGED --lora DIR"]
        more.append(f"python -m fft.serve.server --model {base} --lora mine=DIR")
        more.append(f"python -m fft.train --model {base} --adapter_name_or_path DIR --train_data TABLE ...")
    else:
        name = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
        python = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("DIR", dtype="auto")'
        more = ["python -m fft.serve.server --model DIR", "python -m fft.train --model DIR --train_data TABLE ..."]
    return f"```python\n{python}\n```\n\n## Go on\n\n```\n" + "\n".join(more) + "\n```\n"


def _base(state: Mapping[str, Any]) -> str | None:
    """What the run began with; None for random weights."""
    args = state["arguments"]
    return None if args.get("init") else args.get("from_ckpt") or args.get("model")


def _id(place: str) -> str:
    """A name as the Hub takes it, which has no paths: that of a snapshot in its cache, or else the last part."""
    if snapshot := _SNAPSHOT.search(place):
        return "/".join(snapshot.groups())
    return re.sub(r"[^\w.-]", "-", PurePath(place.rstrip("/")).name).strip("-.") or "unnamed"


def _inherited(base: Path) -> dict[str, Any]:
    """What the header of the base's card says of its license and languages."""
    try:
        text = small_text(base / CARD)
        facts = yaml_value(text.removeprefix("---\n").partition("\n---")[0]) if text.startswith("---\n") else {}
    except (OSError, ValueError):
        return {}
    return {name: facts[name] for name in _INHERITED if name in facts} if isinstance(facts, dict) else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    """A name on its line of a table, as text: no tag of HTML, no cell of its own."""
    told = harmless(" ".join(str(value).split())).replace("&", "&amp;").replace("<", "&lt;")
    return told.replace("\\", "\\\\").replace("|", "\\|")


def _shown(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
