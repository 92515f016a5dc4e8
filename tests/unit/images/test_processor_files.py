"""A trained model's directory has the limits of the images that it was trained on, for all who read it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoImageProcessor, LlamaConfig
from vision_models import FAMILIES, save_model

from fft.images.grids import grid_of
from fft.images.processor_files import set_limits
from fft.images.rules import GRIDS, ImageLimits, ImageRules, load_rules
from fft.weights import hf

SIZES = [(1, 1), (30, 200), (400, 300), (1600, 1200)]


def rules_of(folder: Path) -> ImageRules:
    return load_rules(folder, ImageLimits(), (0, 1))


def limited(rules: ImageRules) -> ImageRules:
    """Other limits than a directory has."""
    factor = rules.factor**2
    if rules.family in GRIDS:
        return replace(rules, min_pixels=2 * factor, max_pixels=13 * factor)
    return replace(rules, max_tiles=3)


@pytest.mark.parametrize("form", ["new", "old", "nested", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_read_back_are_those_that_were_written(family, form, tmp_path):
    save_model(tmp_path, family)
    file, other = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    if form == "old" and family in GRIDS:
        settings |= {"min_pixels": 3136, "max_pixels": 12845056, "size": {"min_pixels": 3136, "max_pixels": 12845056}}
    file.write_text(json.dumps(settings))
    if form in ("nested", "both"):
        other.write_text(json.dumps({"processor_class": "X", "image_processor": settings, "video_processor": {"a": 1}}))
    if form == "nested":
        file.unlink()
    wanted = limited(rules_of(tmp_path))
    assert rules_of(tmp_path) != wanted
    set_limits(tmp_path, wanted)
    assert rules_of(tmp_path) == wanted
    if form == "both":
        assert json.loads(other.read_text())["video_processor"] == {"a": 1}
        other.unlink()
        assert rules_of(tmp_path) == wanted
    if form != "nested":
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        crop = {} if family in GRIDS else {"crop_to_patches": True}
        for width, height in SIZES:
            tiles, high, wide = grid_of(wanted, width, height)
            patches = processor.get_number_of_image_patches(height, width, crop)
            assert patches == (high * wide if family in GRIDS else tiles)


def test_files_that_say_so_already_stay_as_they_are(tmp_path):
    save_model(tmp_path, "qwen2_vl")
    file = tmp_path / "preprocessor_config.json"
    before = json.dumps(json.loads(file.read_text()), separators=(",", ":"))
    file.write_text(before)
    set_limits(tmp_path, rules_of(tmp_path))
    assert file.read_text() == before
    assert not (tmp_path / "processor_config.json").exists()


def test_a_written_model_has_the_processor_of_the_one_trained_from(tmp_path):
    """Also where the tokenizer is another directory's, which has none."""
    model, tokenizer = save_model(tmp_path / "model", "internvl"), save_model(tmp_path / "tokenizer", "internvl")
    (model / "video_preprocessor_config.json").write_text("{}")
    for file in tokenizer.glob("*processor_config.json"):
        file.unlink()
    rules = limited(rules_of(model))
    for number, (named, its) in enumerate(
        ((None, None), (str(tokenizer), None), (str(tokenizer), rules), (None, rules))
    ):
        staging = tmp_path / str(number)
        staging.mkdir()
        names = hf.write_metadata(staging, LlamaConfig(), named, 1, model, its)
        assert {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"} <= set(names)
        (staging / "config.json").write_bytes((model / "config.json").read_bytes())
        assert rules_of(staging) == (its or rules_of(model))
        same = (staging / "preprocessor_config.json").read_bytes() == (model / "preprocessor_config.json").read_bytes()
        assert same == (its is None)
