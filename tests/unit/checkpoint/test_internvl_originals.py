"""InternVL as published: read as transformers' internvl, written as one, and back, with the same values."""

import json
import shutil

import pytest
import torch
from internvl_originals import KINDS, TILE, H, chat_config, features, image_token, write_chat_model
from original_models import FAMILIES, write_original
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from vision_generation import answers_of_transformers, pictures, prompts_of

from fft.checkpoint import convert
from fft.errors import UserError
from fft.images.rules import ImageLimits, load_rules
from fft.models.causal_lm import StageBuilder
from fft.models.directory import check_whole, load_config
from fft.models.spec import ModelSpec
from fft.parallel.tensor_plan import Shard
from fft.serve import batch_infer
from fft.text.encoder import image_ids_of
from fft.weights.hf import WeightReader


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    """Its kind, its directory and its weights."""
    folder = tmp_path_factory.mktemp(request.param) / "original"
    return request.param, folder, write_chat_model(folder, request.param)


@pytest.fixture(scope="module")
def native(original, tmp_path_factory):
    output = tmp_path_factory.mktemp("native") / "model"
    convert.main([str(original[1]), str(output)])
    return output


def test_the_native_model_computes_what_the_description_says(original, native):
    kind, folder, weights = original
    model, info = AutoModelForImageTextToText.from_pretrained(native, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values())
    tiles = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=tiles, vision_feature_layer=-1).pooler_output
        ids = torch.tensor([[5, 9, 200, 31, 7, 7, 90]])
        logits = model(input_ids=ids).logits[0]
    torch.testing.assert_close(found, features(weights, tiles, kind), rtol=0, atol=1e-6)
    assert found.shape[1:] == (4, H)
    assert model.config.image_token_id == image_token(folder)
    if kind == "internlm2":
        family = FAMILIES["internlm2"]
        texts = {name.removeprefix("language_model."): w for name, w in weights.items() if "language_model" in name}
        torch.testing.assert_close(logits, family.forward(texts, ids[0], family.config), rtol=0, atol=5e-6)
    else:
        theirs = {name: value for name, value in model.state_dict().items() if "language_model" in name}
        for name, value in theirs.items():
            stored = name.replace("model.language_model.", "language_model.model.")
            torch.testing.assert_close(value, weights[stored].float().double(), rtol=0, atol=0)


def test_parameters_are_read_where_they_lie(original):
    """Whole and in parts, from the original's files, by the names of the model."""
    _, folder, _ = original
    config = load_config(str(folder), init=False)
    spec, reader = ModelSpec(config, torch.float32), WeightReader(folder)
    check_whole(config, reader.names, folder)
    StageBuilder(spec, weights=reader)
    for name, parameter in spec.skeleton.named_parameters():
        shape = tuple(parameter.shape)
        whole = reader.read(name, shape, None, spec.stored.pieces(name))
        if "q_proj" in name and len(shape) == 2:
            for shard in (Shard(shape, 0, ((3, 9), (20, 31))), Shard(shape, 1, ((4, 17),))):
                part = reader.read(name, shape, shard, spec.stored.pieces(name))
                torch.testing.assert_close(part, shard.of(whole), rtol=0, atol=0)


def test_the_native_directory_is_whole(original, native):
    """Its images' rules are those of the original's code, and its template writes images."""
    kind, folder, _ = original
    tokenizer = AutoTokenizer.from_pretrained(native)
    rules = load_rules(native, ImageLimits(), image_ids_of(tokenizer).around)
    assert (rules.tile, rules.patch, rules.merge, rules.min_tiles, rules.max_tiles) == (TILE, 7, 2, 1, 6)
    assert rules.mean == (0.485, 0.456, 0.406)
    assert rules.image_token == image_token(folder)
    assert (tokenizer.start_image_token, tokenizer.end_image_token) == ("<img>", "</img>")
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    begin = tokenizer.bos_token or "" if kind == "internlm2" else ""
    assert text == f"{begin}<|im_start|>user\n<IMG_CONTEXT>\na<|im_end|>\n<|im_start|>assistant\n"
    assert not list(native.glob("*.py"))


def test_it_answers_prompts_with_images(native, tmp_path):
    """As transformers does by the files that were written."""
    made = pictures(6)
    for number, data in enumerate(made):
        (tmp_path / f"{number}.png").write_bytes(data)
    forms, meant = prompts_of(made)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(form) + "\n" for form in forms))
    flags = ["--model", native, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--dtype"]
    flags += ["float32", "--image_path", tmp_path, "--engine", "transformers", "--max_new_tokens", 12]
    batch_infer.main(list(map(str, flags)))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == answers_of_transformers(native, meant)


@pytest.mark.parametrize("shards", [1, 5])
def test_back_in_the_original_form_nothing_has_changed(original, native, shards, tmp_path):
    _, folder, _ = original
    size = sum(file.stat().st_size for file in native.glob("*.safetensors"))
    gigabytes = ["--max_shard_size", str(size / shards / 1e9)] if shards > 1 else []
    convert.main([str(native), str(tmp_path / "back"), "--like", str(folder), *gigabytes])
    written = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        written |= load_file(file)
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(written) == set(stored)
    for name, value in stored.items():
        assert torch.equal(written[name], value), name
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert WeightReader(tmp_path / "back").names


def test_another_model_is_not_written_like_it(original, native, tmp_path):
    kind, _, _ = original
    other = tmp_path / "other"
    write_chat_model(other, "internlm2" if kind == "6b" else "6b")
    with pytest.raises(UserError, match=r"--like .* is another model: what is read (lacks|has)"):
        convert.main([str(native), str(tmp_path / "out"), "--like", str(other)])
    with pytest.raises(UserError, match="is no original with weights"):
        convert.main([str(native), str(tmp_path / "out"), "--like", str(native)])
    assert not (tmp_path / "out").exists()


REFUSED = {
    "language model of type 'phi3'": {"llm_config": {"model_type": "phi3"}},
    "ps_version is v1": {"ps_version": "v1"},
    "select_layer is -4": {"select_layer": -4},
    "use_thumbnail is False": {"use_thumbnail": False},
    "force_image_size is 448 .*image_size of its tower 28": {"force_image_size": 448},
    "tower of type 'siglip'": {"vision_config": {"model_type": "siglip"}},
    "this is InternVLRewardModel": {"architectures": ["InternVLRewardModel"]},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_another_model_is_named(said, tmp_path):
    write_chat_model(tmp_path, "qwen2")
    (tmp_path / "config.json").write_text(json.dumps(chat_config("qwen2") | REFUSED[said]))
    with pytest.raises(UserError, match=said):
        load_config(str(tmp_path), init=False)


def test_without_its_image_token_it_is_refused(tmp_path):
    write_chat_model(tmp_path, "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="have no token <IMG_CONTEXT>: give the whole directory"):
        load_config(str(tmp_path), init=False)


def test_it_is_converted_before_its_images_are_read(original, tmp_path):
    copy = shutil.copytree(original[1], tmp_path / "copy")
    with pytest.raises(UserError, match=r"give what python -m fft\.checkpoint\.convert .* makes of it"):
        load_rules(copy, ImageLimits(), (0, 1))


@pytest.mark.parametrize("name", ["qwen", "internlm2-bias", "baichuan-7b"])
def test_models_of_texts_go_back_to_their_original_form(name, tmp_path):
    family = FAMILIES[name]
    weights = write_original(tmp_path / "original", family)
    convert.main([str(tmp_path / "original"), str(tmp_path / "model")])
    convert.main([str(tmp_path / "model"), str(tmp_path / "back"), "--like", str(tmp_path / "original")])
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], value.float()) for name, value in weights.items())
