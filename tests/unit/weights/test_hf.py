"""Hugging Face directories: read by name, written by stage, published whole."""

import json
import os

import pytest
import torch
from transformers import LlamaConfig

from fft.errors import UserError
from fft.files import end_of, replace_folder, staging_folder, start_folder
from fft.weights import hf

SHARDS = [{"a.weight": torch.arange(6.0).view(2, 3)}, {"b.weight": torch.ones(4), "c.bias": torch.zeros(2)}]


def finish(staging, output, shards, model=None):
    hf.write_metadata(staging, LlamaConfig(), None, shards, model)
    replace_folder(end_of(output))


def write(output, shards=SHARDS):
    staging = staging_folder(end_of(output))
    staging.mkdir()
    for number, tensors in enumerate(shards):
        hf.write_shard(staging, tensors, number, len(shards))
    assert not output.exists() or not (output / "half").exists()
    finish(staging, output, len(shards))
    return hf.WeightReader(output)


@pytest.mark.parametrize("shards", [SHARDS, [SHARDS[0] | SHARDS[1]]])
def test_what_stages_write_is_read_back(tmp_path, shards):
    reader = write(tmp_path / "model", shards)
    for name, value in (SHARDS[0] | SHARDS[1]).items():
        assert torch.equal(reader.read(name, value.shape), value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no staging folder is left


def test_a_directory_is_replaced_whole(tmp_path):
    write(tmp_path / "model")
    (tmp_path / "model" / "stale.safetensors").touch()
    write(tmp_path / "model", [SHARDS[1]])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_until_finished_the_old_directory_stands(tmp_path):
    write(tmp_path / "model")
    staging = staging_folder(tmp_path / "model")
    staging.mkdir()
    hf.write_shard(staging, {"a.weight": torch.zeros(2, 3)}, 0, 2)  # and then the job dies
    assert torch.equal(hf.WeightReader(tmp_path / "model").read("a.weight", torch.Size([2, 3])), SHARDS[0]["a.weight"])


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    reader = write(tmp_path / "model")
    with pytest.raises(UserError, match=r"has no tensor d\.weight"):
        reader.read("d.weight", torch.Size([1]))
    with pytest.raises(UserError, match=r"a\.weight has shape \(2, 3\), config\.json implies \(3, 2\)"):
        reader.read("a.weight", torch.Size([3, 2]))


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    (tmp_path / "model" / index["weight_map"]["c.bias"]).unlink()
    with pytest.raises(UserError, match=r"lacks .*model-00002-of-00002"):
        hf.WeightReader(tmp_path / "model")


def test_no_weights_at_all(tmp_path):
    with pytest.raises(UserError, match="or start from scratch with --init"):
        hf.WeightReader(tmp_path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"", b"\x08"])
def test_a_file_that_is_no_safetensors_is_named(tmp_path, content):
    write(tmp_path / "model", [SHARDS[0]])
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is no readable safetensors file .*: it may be cut off"):
        hf.WeightReader(tmp_path / "model")


def test_a_shard_that_was_cut_off_is_named_when_it_is_read(tmp_path):
    reader = write(tmp_path / "model")
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is no readable safetensors file"):
        reader.read("a.weight", torch.Size([2, 3]))
    assert torch.equal(reader.read("b.weight", torch.Size([4])), torch.ones(4))


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is no (index of safetensors files|JSON)"):
        hf.WeightReader(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path):
    write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["a.weight"] = index["weight_map"]["b.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors has no tensor a\.weight"):
        hf.WeightReader(tmp_path / "model").read("a.weight", torch.Size([2, 3]))


def test_a_link_stays_a_link(tmp_path):
    """Models often live on another disk behind a link: twice written, the link still leads to the new one."""
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "models")
    write(tmp_path / "link")
    reader = write(tmp_path / "link", [SHARDS[1]])
    assert torch.equal(reader.read("b.weight", torch.Size([4])), torch.ones(4))
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["models"]


def staged(tmp_path, shards):
    staging = start_folder(tmp_path / "model")
    for shard in range(shards):
        hf.write_shard(staging, {f"{shard}.weight": torch.ones(2, 4)}, shard, shards)
    return staging


def test_the_index_counts_bytes_of_tensors(tmp_path):
    finish(staged(tmp_path, 2), tmp_path / "model", 2)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 2 * 4 * 4


def test_the_generation_config_is_the_models(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    finish(staged(tmp_path, 1), tmp_path / "model", 1, tmp_path / "from")
    assert (tmp_path / "model" / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'


def test_an_interrupted_replacement_loses_no_model(tmp_path, monkeypatch):
    finish(staged(tmp_path, 1), tmp_path / "model", 1)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    staging, replace = staged(tmp_path, 1), os.replace

    def dies_after_the_first(source, target):
        replace(source, target)
        if str(target).endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        finish(staging, tmp_path / "model", 1)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(os, "replace", replace)
    start_folder(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"none/model\.safetensors cannot be written \(.*\): make room there"):
        hf.write_shard(tmp_path / "none", {"a": torch.ones(2)}, 0, 1)


#: What a tokenizer may consist of, and what else may lie beside it.
TOKENIZER = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "qwen.tiktoken", "tekken.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tools.jinja", "tokenization_mine.py", "preprocessor_config.json"),
]
OTHERS = ["README.md", "train.py", "model.safetensors", "training/state.json", "SHA256SUMS", "pytorch_model.bin"]


def test_all_files_of_a_tokenizer_are_kept_and_no_others(tmp_path):
    source, staging = tmp_path / "source", tmp_path / "staging"
    for name in TOKENIZER + OTHERS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}" if name.endswith("json") else name)
    staging.mkdir()
    made = hf.write_metadata(staging, LlamaConfig(), str(source), 1)
    assert made == sorted([*TOKENIZER, "config.json"])
    assert (
        staging / "additional_chat_templates" / "tools.jinja"
    ).read_text() == "additional_chat_templates/tools.jinja"


def test_code_is_kept_where_a_config_names_it(tmp_path):
    source, staging = tmp_path / "source", tmp_path / "staging"
    source.mkdir()
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["helpers.Mine", null]}}')
    (source / "helpers.py").write_text("import more")
    staging.mkdir()
    assert "helpers.py" in hf.write_metadata(staging, LlamaConfig(), str(source), 1)


def test_a_config_names_no_code_that_is_not_there(tmp_path):
    config = LlamaConfig(auto_map={"AutoConfig": "configuration_mine.Mine"})
    hf.write_metadata(tmp_path, config, None, 1)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_a_tokenizer_that_is_not_whole_is_kept_too(tmp_path):
    """Of a model directory with no tokenizer_config.json: the trainer needs none, whoever takes the model may."""
    source, staging = tmp_path / "source", tmp_path / "staging"
    source.mkdir()
    (source / "tokenizer.model").write_text("pieces")
    staging.mkdir()
    assert hf.write_metadata(staging, LlamaConfig(), None, 1, source) == ["config.json", "tokenizer.model"]
