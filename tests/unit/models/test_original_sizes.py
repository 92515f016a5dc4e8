"""Configs of all sizes of the promised families are understood: how large they are, how a run of them is laid out."""

import json

import pytest
from original_models import FAMILIES

from fft.arguments import parse_arguments
from fft.models.directory import load_config
from fft.models.spec import DTYPES, ModelSpec
from fft.models.supported import check_supported
from fft.planning.dry_run import dry_run


def sizes(hidden, intermediate, layers, heads, vocabulary, **others):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **others,
    }


#: As published but for qwen-1.8b, which is from memory; and billions of parameters, counted by hand from the shapes.
SIZES = {
    "qwen-1.8b": ("qwen", sizes(2048, 11008, 24, 16, 151936, seq_length=8192), 1.837),
    "qwen-7b": ("qwen", sizes(4096, 22016, 32, 32, 151936, seq_length=8192), 7.721),
    "qwen-14b": ("qwen", sizes(5120, 27392, 40, 40, 152064, seq_length=2048), 14.167),
    "qwen-72b": ("qwen", sizes(8192, 49152, 80, 64, 152064, seq_length=32768, rotary_emb_base=1000000), 72.288),
    "internlm2-1.8b": ("internlm2", sizes(2048, 8192, 24, 16, 92544, num_key_value_heads=8), 1.889),
    "internlm2-7b": ("internlm2", sizes(4096, 14336, 32, 32, 92544, num_key_value_heads=8), 7.738),
    "internlm2-20b": ("internlm2", sizes(6144, 16384, 48, 48, 92544, num_key_value_heads=8), 19.861),
    "baichuan-7b": ("baichuan-7b", sizes(4096, 11008, 32, 32, 64000), 7.001),
    "baichuan2-7b": ("baichuan2-7b", sizes(4096, 11008, 32, 32, 125696), 7.506),
    "baichuan-13b": ("baichuan-13b", sizes(5120, 13696, 40, 40, 64000), 13.2649),
    "baichuan2-13b": ("baichuan2-13b", sizes(5120, 13696, 40, 40, 125696), 13.897),
}


def config_file(folder, name):
    family, size, _ = SIZES[name]
    given = FAMILIES[family].config | size
    if family == "qwen":
        given["kv_channels"] = 128
    (folder / "config.json").write_text(json.dumps(given))
    return folder / "config.json"


@pytest.mark.parametrize("name", SIZES)
def test_a_config_has_the_parameters_that_its_name_says(tmp_path, name, capsys):
    config = load_config(str(config_file(tmp_path, name)), init=True)
    check_supported(config, 2048)
    spec = ModelSpec(config, DTYPES["bf16"])
    assert sum(p.numel() for p in spec.skeleton.parameters()) / 1e9 == pytest.approx(SIZES[name][2], abs=2e-3)
    assert spec.head_size == 128
    flags = "--dry_run --init --seq_len 2048 --ranks 8 --pipe_parallel_size 4 --model_parallel_size 2 --model"
    dry_run(parse_arguments([*flags.split(), str(tmp_path / "config.json")]))
    printed = capsys.readouterr().out
    assert f"{SIZES[name][2]:.2f} B parameters" in printed
    assert "stage 3  6-7" in printed
    assert (spec.slopes() is not None) == name.endswith("13b") == (spec.attended_size == 144)
