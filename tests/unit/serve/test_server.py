"""The command that becomes vLLM's server: what it checks, and what it tells vLLM."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fft.checkpoint.adapter import adapter_config
from fft.errors import UserError
from fft.models.lora import Lora
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve import server
from fft.serve.middleware import API_KEYS, SHUTDOWN_TIMEOUT


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer(["def f(x):", "San Francisco is a city."], 270)
    save_tokenizer(tokenizer, folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def own_model(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "own")


@pytest.fixture
def adapter(model_dir, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": torch.ones(3, 16), f"{name}.lora_B.weight": torch.ones(16, 3)}
    save_file(matrices, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(Lora(3, 6, ("q_proj",)), model_dir)))
    return folder


@pytest.fixture
def started(monkeypatch):
    """Runs the command; what it becomes: the flags after --middleware, and all of it with its environment."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "vllm" or find(name))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    for name in ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", API_KEYS):
        monkeypatch.delenv(name, raising=False)
    became = []
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))

    def run(*arguments):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        main = [*map(str, arguments)]
        server.main(main if "--port" in main or "--uds" in main else [*main, "--port", str(port)])
        program, command, environment = became.pop()
        assert program == command[0] == sys.executable
        return Started(command, environment, port)

    return run


class Started:
    def __init__(self, command, environment, port) -> None:
        self.command, self.environment, self.port = command, environment, port
        self.flags, name = {}, None
        for word in command[command.index("--middleware") :]:
            if word.startswith("--"):
                name = word
                self.flags[name] = []
            else:
                self.flags[name].append(word)


def test_vllm_is_told_what_it_needs_and_gets_all_other_flags(started, model_dir):
    became = started("--model", model_dir, "--max-num-seqs", "7", "--seed=3", "--enforce-eager")
    memory = int(became.flags.pop("--kv-cache-memory-bytes")[0])
    assert 64 << 20 <= memory < 1 << 42
    assert became.flags == {
        "--middleware": ["fft.serve.middleware.Generate"],
        "--host": ["127.0.0.1"],
        "--port": [str(became.port)],
        "--shutdown-timeout": ["30"],
        "--served-model-name": ["tiny", str(model_dir)],
        "--chat-template": ["{% for message in messages %}{{ message.content }}{% endfor %}"],
        "--dtype": ["float32"],
        "--max-model-len": ["auto"],
        "--no-enable-chunked-prefill": [],
        "--max-num-batched-tokens": ["4096"],
        "--max-num-seqs": ["7"],
        "--seed=3": [],
        "--enforce-eager": [],
    }
    assert became.environment["VLLM_NO_USAGE_STATS"] == "1"
    assert became.environment[API_KEYS] == "[]"
    assert became.environment[SHUTDOWN_TIMEOUT] == "30"


def test_what_is_given_is_left_as_it_is(started, model_dir, monkeypatch, tmp_path):
    flags = ["--dtype=bfloat16", "--chat_template", "t", "--gpu_memory_utilization", "0.5", "--served-model-name", "m"]
    flags += ["--max-num-batched-tokens", "64"]
    became = started("--model", model_dir, "--host", "localhost", "--shutdown-timeout", 0, *flags)
    assert became.command[became.command.index("--host") :] == [
        *("--host", "localhost", "--port", str(became.port), "--shutdown-timeout", "0", *flags)
    ]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "--kv-cache-memory-bytes" not in started("--model", model_dir).flags
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\ndtype: bfloat16\nmax_model_len: 32\nshutdown_timeout: 5\nport: 80\n")
    became = started("--model", model_dir, "--port", 8123, "--config", file)
    assert not {"--host", "--dtype", "--max-model-len", "--shutdown-timeout"} & set(became.flags)
    assert became.flags["--port"] == ["8123"]
    assert became.environment[SHUTDOWN_TIMEOUT] == "5"
    assert not {"--host", "--port"} & set(started("--model", model_dir, "--uds", "/tmp/socket").flags)


def test_a_gpu_keeps_vllms_own_memory_and_type(started, model_dir, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert not {"--dtype", "--kv-cache-memory-bytes", "--max-model-len"} & set(started("--model", model_dir).flags)


def test_vllm_without_metadata_is_started_by_its_module(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    assert server.launcher("m") == ["-m", "vllm.entrypoints.cli.main", "serve", "m"]

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert server.launcher("m") == ["-m", "vllm.entrypoints.openai.api_server", "--model", "m"]


def test_keys_go_to_the_middleware_and_stand_in_no_command_line(started, model_dir, monkeypatch):
    became = started("--model", model_dir, "--api-key", "one", "two")
    assert json.loads(became.environment[API_KEYS]) == ["one", "two"]
    assert not {"one", "two"} & set(became.command)
    monkeypatch.setenv("VLLM_API_KEY", "three")
    became = started("--model", model_dir)
    assert json.loads(became.environment[API_KEYS]) == ["three"]
    assert "VLLM_API_KEY" not in became.environment
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert started("--model", model_dir).environment[API_KEYS] == "[]"


def test_an_open_door_is_told(started, model_dir, capsys):
    started("--model", model_dir, "--host", "0.0.0.0")
    assert "whoever reaches 0.0.0.0 may use the model: --api_key guards it" in capsys.readouterr().err
    started("--model", model_dir, "--host", "0.0.0.0", "--api_key", "one")
    assert "whoever" not in capsys.readouterr().err


def test_a_template_of_the_models_own_stays(started, own_model):
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(own_model)
    assert "--chat-template" not in started("--model", own_model).flags


def test_a_completed_text_begins_as_the_tokenizer_begins_texts(started, own_model):
    tokenizer = json.loads((own_model / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (own_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((own_model / "tokenizer_config.json").read_text())
    (own_model / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    (template,) = started("--model", own_model).flags["--chat-template"]
    loaded = AutoTokenizer.from_pretrained(own_model)
    text = loaded.apply_chat_template([{"role": "user", "content": "def f"}], chat_template=template, tokenize=False)
    assert loaded(text, add_special_tokens=False)["input_ids"] == loaded("def f")["input_ids"]
    assert loaded("def f")["input_ids"][0] == 0


def test_a_head_that_is_not_tied_is_kept(started, own_model):
    weights = load_file(own_model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding + 1}, own_model / "model.safetensors", {"format": "pt"})
    assert started("--model", own_model).flags["--hf-overrides"] == ['{"tie_word_embeddings": false}']


def test_adapters_are_served_beside_their_base(started, model_dir, adapter):
    flags = started("--model", model_dir, "--lora", f"poet={adapter}", "--lora", f"b={adapter}").flags
    assert [json.loads(module) for module in flags["--lora-modules"]] == [
        {"name": name, "path": str(adapter), "base_model_name": "tiny"} for name in ("poet", "b")
    ]
    assert flags["--enable-lora"] == []
    assert (flags["--max-lora-rank"], flags["--max-loras"]) == (["8"], ["2"])
    assert started("--model", model_dir, "--lora", f"a={adapter}", "--max_loras", 4).flags["--max_loras"] == ["4"]


def test_weights_that_only_vllm_reads_are_left_to_it(started, own_model):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "--hf-overrides" not in started("--model", own_model).flags


def refusal(started, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        started(*arguments)
    return str(caught.value)


def test_what_cannot_be_served_is_one_sentence(started, model_dir, own_model, adapter, monkeypatch, tmp_path):
    assert "does not exist: give a Hugging Face model directory" in refusal(started, "--model", tmp_path / "none")
    assert "is an adapter: give its base as --model" in refusal(started, "--model", adapter)
    assert "--lora poet: give NAME=DIR" in refusal(started, "--model", model_dir, "--lora", "poet")
    assert "name of its own" in refusal(started, "--model", model_dir, "--lora", f"tiny={adapter}")
    twice = ["--lora", f"a={adapter}", "--lora", f"a={adapter}"]
    assert "name of its own" in refusal(started, "--model", model_dir, *twice)
    assert "is no adapter directory" in refusal(started, "--model", model_dir, "--lora", f"a={model_dir}")
    assert "name all adapters by --lora" in refusal(started, "--model", model_dir, *twice[:2], "--lora-modules", "b=c")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora" in refusal(started, "--model", model_dir, *twice[:2])
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 513}))
    assert "vLLM takes no rank of 513" in refusal(started, "--model", model_dir, *twice[:2])
    for port in ("0", "70000", "http"):
        assert f"{port} is no port from 1 to 65535" in refusal(started, "--model", model_dir, "--port", port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refusal(started, "--model", model_dir, "--port", port)
    assert f"--host 127.0.0.1 --port {port} is not to be had (Address already in use): choose others." in told
    assert "--api_key is empty" in refusal(started, "--model", model_dir, "--api_key", "")
    file = tmp_path / "vllm.yaml"
    assert "--config cannot be read" in refusal(started, "--model", model_dir, "--config", file)
    file.write_text("api_key: secret")
    assert "use --api_key or VLLM_API_KEY" in refusal(started, "--model", model_dir, "--config", file)
    (own_model / "tokenizer.json").write_text("{}")
    assert "has no tokenizer that can be loaded" in refusal(started, "--model", own_model)


def test_without_vllm_the_command_says_how_to_get_it(model_dir):
    code = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'vllm' else f(n);"
    code += "from fft.errors import run_cli; from fft.serve import server; run_cli(server.main)"
    run = subprocess.run([sys.executable, "-c", code, "--model", model_dir], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: vLLM is not installed: pip install vllm, in")


def test_help_loads_no_torch():
    code = "import sys; from fft.serve import server\ntry: server.main(['--help'])\n"
    code += "except SystemExit: print({'torch', 'transformers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "set()"
