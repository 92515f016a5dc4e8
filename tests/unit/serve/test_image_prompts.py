"""Prompts with images: read in every form, and answered as transformers' own processors and generate do."""

import base64
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from generation import TEMPLATE, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of
from vision_models import FAMILIES, chat_of, theirs

from fft.errors import UserError
from fft.images.rules import ImageSettings
from fft.serve import batch_infer
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import check_model
from fft.serve.engines.transformers_engine import TransformersEngine
from fft.serve.images import stretches_of, values_of
from fft.serve.prompts import Renderer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures, and the pictures."""
    folder, made = tmp_path_factory.mktemp("images"), pictures(6)
    for number, data in enumerate(made):
        (folder / f"{number}.png").write_bytes(data)
    return folder, made


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return make_vision_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


def infer(model, records, folder, images, *flags, name="out.jsonl"):
    """Rows that the command writes."""
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["--model", model, "--input", folder / "in.jsonl", "--output", folder / name, "--image_path", images]
    given += ["--engine", "transformers", "--max_new_tokens", 12, *flags]
    batch_infer.main(list(map(str, given)))
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_answers_are_those_of_transformers_own_processors(model, images, tmp_path):
    folder, made = images
    forms, meant = prompts_of(made)
    rows = infer(model, forms, tmp_path, folder, "--batch_size", 3)
    expected = answers_of_transformers(model, meant)
    assert [row["text"] for row in rows] == expected
    assert len(set(expected)) == len(expected)
    assert [{key: row[key] for key in form} for row, form in zip(rows, forms, strict=True)] == forms


def test_ids_and_pixels_of_random_chats_are_those_of_transformers(model, tmp_path):
    """Images of all kinds, in all forms; what follows the last turn is written for the model to answer."""
    rng = np.random.default_rng(4)
    checked = check_model(str(model), images=ImageSettings(str(tmp_path)))
    renderer = Renderer.of(checked.tokenizer, checked.limit, images=checked.images)
    begin = checked.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    seen = 0
    for number in range(40):
        record, messages, images = chat_of(rng, tmp_path, number)
        expected, values = theirs(model, messages[:-1], images)
        found = renderer.render(record | {"messages": record["messages"][:-1]})
        assert found == expected + begin
        assert sum(count for _, count in stretches_of(found, found.images, checked.images.rules)) == found.count(
            checked.images.rules.image_token
        )
        if images:
            own = values_of(found.images, checked.images.rules)
            assert own.keys() <= values.keys()
            for name, value in own.items():
                np.testing.assert_allclose(value, values[name], rtol=0, atol=1e-6)
            raw = values_of(found.images, checked.images.rules, raw=True)["pixel_values"]
            assert (raw.dtype, raw.shape) == (np.uint8, own["pixel_values"].shape)
        seen += len(images)
    assert seen > 30


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_vision_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2_vl")


def test_limits_are_those_that_are_asked_for(qwen, images, tmp_path):
    """As a directory has them that says so itself."""
    folder, made = images
    forms, meant = prompts_of(made)
    least, most = 2 * 14**2, 9 * 14**2
    rows = infer(qwen, forms, tmp_path, folder, "--max_pixels", most, "--min_pixels", least)
    other = shutil.copytree(qwen, tmp_path / "model")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": least, "longest_edge": most}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    assert [row["text"] for row in rows] == answers_of_transformers(other, meant)
    assert [row["text"] for row in rows] == [
        row["text"] for row in infer(other, forms, tmp_path, folder, name="o.json")
    ]
    assert [row["text"] for row in rows] != answers_of_transformers(qwen, meant)


def test_images_in_columns_of_parquet_and_in_requests_of_openai(qwen, images, tmp_path):
    folder, made = images
    struct = [[{"bytes": made[0], "path": None}, {"bytes": None, "path": "1.png"}], [{"bytes": made[2], "path": "x"}]]
    texts = ["a <image> b <image>", "<image> mat"]
    table = pa.table({"q": texts, "images": struct})
    pq.write_table(table, tmp_path / "in.parquet")
    pq.write_table(table.set_column(1, "image", pa.array([[made[0], made[1]], [made[2]]])), tmp_path / "bytes.parquet")
    lines = [
        {"custom_id": str(row), "body": {"messages": [{"role": "user", "content": [text, *files]}], "max_tokens": 12}}
        for row, (text, files) in enumerate(zip(texts, (["0.png", "1.png"], ["2.png"]), strict=True))
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--model", qwen, "--prompt_key", "q", "--image_path", folder, "--engine", "transformers"]
    found = []
    for number, name in enumerate(("in.parquet", "bytes.parquet", "lines.jsonl")):
        output = ["--input", tmp_path / name, "--output", tmp_path / f"{number}.jsonl", "--max_new_tokens", 12]
        batch_infer.main(list(map(str, given + output)))
        found.append([json.loads(line) for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()])
    columns, as_bytes, requests = found
    assert [row["text"] for row in columns] == [row["text"] for row in as_bytes]
    answers = [row["response"]["body"]["choices"][0]["message"]["content"] for row in requests]
    assert answers == [row["text"] for row in columns]
    assert columns[1]["images"] == [{"bytes": base64.b64encode(made[2]).decode(), "path": "x"}]


BAD = [
    ({"messages": [{"user": ["<image>", "none.png"]}]}, r"image 1 \(none.png\) cannot be read: No such file"),
    ({"messages": [{"user": ["<image>", "../0.png"]}]}, "lies outside of image_path"),
    ({"prompt": "no mark", "images": ["0.png"]}, "1 images beside the turns are in none"),
    ({"prompt": "<image><image>", "images": ["0.png"]}, "has 2 <image>, for which 1 images are left"),
    ({"prompt": "a <|image_pad|>"}, "a text holds <|image_pad|>, which stands for an image"),
    ({"messages": [{"user": ["<image>", "broken.png"]}]}, r"image 1 \(broken.png\) cannot be read"),
    ({"prompt": "<image>" * 90, "images": ["0.png"] * 90}, "the prompt has [0-9,]+ tokens, but may have 1,023"),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_bad_images_are_named_or_kept_aside(record, said, qwen, images, tmp_path):
    folder, made = images
    (folder / "broken.png").write_bytes(made[1][:-30])
    with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{said}"):
        infer(qwen, [{"prompt": "x"}, record], tmp_path, folder)
    rows = infer(qwen, [{"prompt": "x"}, record], tmp_path, folder, "--on_error", "quarantine")
    assert [row["finish_reason"] for row in rows] == ["length", "error"]


def test_what_does_not_belong_together_is_one_sentence(qwen, images, tmp_path):
    folder, _ = images
    text = make_model(tmp_path / "text", template=TEMPLATE)
    for model, flags, said in (
        (text, [], "--model .* images are read for models of type .* says llama"),
        (qwen, ["--max_tiles", 3], "--max_tiles is no limit of qwen2_vl"),
        (qwen, ["--max_pixels", 3], "--max_pixels 3: it must be at least 196"),
        (qwen, ["--image_path", tmp_path / "none"], "--image_path .*none is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            infer(model, [{"prompt": "x"}], tmp_path, folder, *flags)
    with pytest.raises(UserError, match="--max_pixels is a limit of images: give --image_path"):
        batch_infer.main(
            ["--model", str(qwen), "--input", "in", "--output", str(tmp_path / "o.jsonl"), "--max_pixels", "9"]
        )


def test_a_run_does_not_go_on_with_other_images(qwen, images, tmp_path, monkeypatch):
    folder = shutil.copytree(images[0], tmp_path / "images")
    records = [{"messages": [{"user": ["<image>", f"{number}.png"]}]} for number in range(6)]
    whole = infer(qwen, records, tmp_path, folder, "--batch_size", 1, name="whole.jsonl")
    real, asked = TransformersEngine.step, []

    def step(engine):
        asked.append(1)
        if len(asked) > 3:
            raise KeyboardInterrupt
        return real(engine)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            infer(qwen, records, tmp_path, folder, "--batch_size", 1)
    kept = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(images[1][0])
    with pytest.raises(UserError, match="images"):
        infer(qwen, records, tmp_path, folder, "--batch_size", 1)
    (folder / "5.png").write_bytes(kept)
    assert infer(qwen, records, tmp_path, folder, "--batch_size", 1) == whole


def test_vllm_without_torchvision_is_left_to_transformers(qwen, monkeypatch):
    monkeypatch.setattr("fft.serve.engines.checked._has_vllm", lambda: True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert check_model(str(qwen)).engine == "transformers"
    with pytest.raises(UserError, match="is a model of images, for which vLLM needs torchvision"):
        check_model(str(qwen), EngineOptions("vllm"))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    assert check_model(str(qwen)).engine == "vllm"


def test_an_adapter_is_added_to_the_decoder(model, images, tmp_path):
    """By the names that modules have, as PEFT and the trainer write them."""
    folder, made = images
    generator, matrices = torch.Generator().manual_seed(0), {}
    reference = AutoModelForImageTextToText.from_pretrained(model)
    for name, weight in reference.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "down_proj.weight")):
            up, down = (
                torch.randn(*shape, generator=generator) / 4 for shape in ((len(weight), 4), (4, weight.shape[1]))
            )
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            matrices |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            weight.data += 2 * up @ down
    adapter, merged = tmp_path / "adapter", shutil.copytree(model, tmp_path / "merged")
    adapter.mkdir()
    save_file(matrices, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    reference.save_pretrained(merged)
    forms, meant = prompts_of(made)
    rows = infer(model, forms, tmp_path, folder, "--lora", adapter)
    assert [row["text"] for row in rows] == answers_of_transformers(merged, meant)
    assert [row["text"] for row in rows] != answers_of_transformers(model, meant)


def test_weights_that_lack_a_part_of_the_tower_are_named(qwen, tmp_path):
    copy = shutil.copytree(qwen, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "merger" in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        check_model(str(copy))
