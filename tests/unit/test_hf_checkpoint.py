"""Hugging Face directories: read by name, written by stage, published whole."""

import json

import pytest
import torch
from transformers import LlamaConfig

from fft.checkpoint import hf
from fft.errors import UserError

SHARDS = [{"a.weight": torch.arange(6.0).view(2, 3)}, {"b.weight": torch.ones(4), "c.bias": torch.zeros(2)}]


def write(output, shards=SHARDS):
    staging = hf.staging_dir(output)
    staging.mkdir()
    for number, tensors in enumerate(shards):
        hf.write_shard(staging, tensors, number, len(shards))
    assert not output.exists() or not (output / "half").exists()
    hf.finish(staging, output, LlamaConfig(), None, len(shards))
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
    staging = hf.staging_dir(tmp_path / "model")
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
