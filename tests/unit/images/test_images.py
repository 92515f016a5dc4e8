"""Grids, pixels and positions equal transformers'; every odd image has its documented outcome."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from vision_models import FAMILIES, picture, save_model

from fft.errors import UserError
from fft.images.grids import ImageError, arrangement, grid_of, smart_size, tokens_of
from fft.images.pixels import MOST_PIXELS, check_image, normalized, patches_of, size_of, to_rgb
from fft.images.positions import image_begins, positions_of
from fft.images.rules import ImageLimits, ImageRules, load_rules


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(folder / family, family) for family in FAMILIES}


def rules_of(folder, **limits):
    return load_rules(folder, ImageLimits(**limits), (2, 3))


QWEN = ImageRules("qwen2_vl", 14, 2, 2, 9, 7, 8, 56 * 56, 1280 * 28 * 28)


def test_sizes_are_those_of_transformers():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 4000, (500, 2)).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        theirs = smart_resize(height, width, 28, QWEN.min_pixels, QWEN.max_pixels)
        assert smart_size(QWEN, width, height) == theirs
    with pytest.raises(ImageError, match="2000 x 9 pixels: one side is more than 200 times the other"):
        grid_of(QWEN, 2000, 9)


def test_tiles_are_those_of_transformers_and_follow_from_their_number():
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(1, 3000, (400, 2)).tolist(), [448, 448], [896, 448], [1344, 448], [1000, 750], [1, 1]]
    for width, height in sizes:
        for fewest, most in ((1, 12), (1, 6), (2, 4)):
            ours = arrangement(width, height, 448, fewest, most)
            assert ours == get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)
            tiles = ours[0] * ours[1]
            assert ours == arrangement(width, height, 448, tiles, tiles)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_transformers(models, family):
    rules, rng = rules_of(models[family]), np.random.default_rng(2)
    processor = AutoImageProcessor.from_pretrained(models[family])
    for _ in range(25):
        data = picture(rng)
        size = check_image(data)
        assert size == size_of(data)
        grid = grid_of(rules, size.width, size.height)
        ours = normalized(patches_of(data, grid, rules), rules)
        image = to_rgb(data)
        assert image.size == (size.width, size.height)
        if family == "internvl":
            theirs = processor(images=[image], return_tensors="np", crop_to_patches=True)["pixel_values"]
            tiles, patch = len(theirs), rules.patch
            assert grid == (tiles, 4, 4)
            theirs = theirs.reshape(tiles, 3, 4, patch, 4, patch).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch**2)
        else:
            values = processor(images=[image], return_tensors="np")
            assert [grid] == [tuple(g) for g in values["image_grid_thw"].tolist()]
            theirs = values["pixel_values"].reshape(len(ours), 3, 2, -1)
            assert np.array_equal(theirs[:, :, 0], theirs[:, :, 1])
            theirs = theirs[:, :, 0].reshape(len(ours), -1)
        assert np.abs(ours - theirs).max() <= 1e-6
        assert tokens_of(rules, grid) == len(ours) // rules.merge**2


@pytest.mark.parametrize("model", [Qwen2VLModel, Qwen2_5_VLModel, Qwen3VLModel])
def test_positions_are_those_of_transformers(model):
    rng, sizes = np.random.default_rng(3), {"spatial_merge_size": 2, "tokens_per_second": 2}
    own = type("Own", (), {"config": type("C", (), {"vision_config": type("V", (), sizes)})})()
    own.get_vision_position_ids = model.get_vision_position_ids.__get__(own)
    for _ in range(20):
        rows, theirs, grids = [], [], []
        for _ in range(3):
            ids = rng.integers(0, 5, int(rng.integers(1, 9))).tolist()
            shapes = [(1, *(2 * rng.integers(1, 6, 2)).tolist()) for _ in range(int(rng.integers(0, 3)))]
            for shape in shapes:
                ids += [7, *[9] * (shape[1] * shape[2] // 4), 8]
            ids = torch.tensor([ids])
            types = (ids == 9).int()
            theirs.append(model.get_rope_index(own, ids, types, torch.tensor(shapes) if shapes else None)[0][:, 0])
            rows.append(ids[0].numpy())
            grids += shapes
        ends = np.cumsum([len(row) for row in rows])
        ours = positions_of(np.concatenate(rows), ends, np.array(grids, np.int32), 9, 2)
        assert ours.dtype == np.int32
        assert np.array_equal(ours, torch.cat(theirs, 1).numpy())


def test_adjacent_images_are_two_and_foreign_tokens_none():
    grids = np.array([[1, 2, 4], [1, 2, 2]])
    assert positions_of(np.array([9, 9, 9]), [3], grids, 9, 2)[2].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="2 tokens are of images, their grids have 3"):
        image_begins(np.array([9, 9]), np.array([2, 1]), 9)
    with pytest.raises(ValueError, match="do not lie together"):
        image_begins(np.array([9, 1, 9]), np.array([2]), 9)


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_sixteen_bits_keep_the_upper_eight():
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    ours = np.asarray(to_rgb(saved(Image.fromarray(values), "PNG")))
    assert np.array_equal(ours, np.repeat((values >> 8)[..., None], 3, 2))


def test_an_orientation_turns_the_image():
    image, exif = Image.new("RGB", (30, 10)), Image.Exif()
    exif[0x0112] = 6
    size = size_of(saved(image, "JPEG", exif=exif))
    assert (size.width, size.height) == (10, 30)


def test_the_first_frame_of_an_animation_and_one_pixel():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = saved(red, "GIF", save_all=True, append_images=[blue])
    assert check_image(data).frames
    assert to_rgb(data).getpixel((0, 0)) == (255, 0, 0)
    one = saved(Image.new("RGB", (1, 1), "red"), "PNG")
    grid = grid_of(QWEN, 1, 1)
    assert grid == (1, 4, 4)
    assert patches_of(one, grid, QWEN).shape == (16, 588)


def test_transparency_is_dropped():
    assert to_rgb(saved(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG")).getpixel((0, 0)) == (10, 20, 30)


def png_of(width, height):
    """A PNG whose header says so, with nothing in it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_no_image_is_refused():
    whole = picture(np.random.default_rng(4), "jpeg")
    refused = {
        b"": "cannot be read \\(it is no image\\)",
        b"<html>": "it is no image",
        whole[: len(whole) // 2]: "cannot be read \\(image file is truncated",
        png_of(20_000, 20_000): "20000 x 20000 pixels|exceeds limit",
        png_of(10_000, 9_000): f"has 10000 x 9000 pixels, more than {MOST_PIXELS:,}",
        saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"): "has 32 bits a pixel",
    }
    for data, reason in refused.items():
        with pytest.raises(ImageError, match=reason):
            check_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_random_bytes_never_end_in_another_error():
    rng = np.random.default_rng(5)
    for kind in ("jpeg", "png", "animated", "palette"):
        data = bytearray(picture(rng, kind))
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 5).tolist():
                broken[at] = int(rng.integers(0, 256))
            try:
                size = check_image(bytes(broken))
            except ImageError:
                continue
            assert to_rgb(bytes(broken)).size == (size.width, size.height)


def test_rules_are_read_once_and_kept(models, tmp_path):
    rules = rules_of(models["qwen2_5_vl"], max_pixels=4000)
    assert (rules.patch, rules.merge, rules.max_pixels) == (7, 2, 4000)
    assert ImageRules.of(json.loads(json.dumps(rules.facts())), "it") == rules
    assert rules_of(models["internvl"]).max_tiles == 6
    assert (rules_of(models["internvl"], max_tiles=1).max_tiles, rules_of(models["internvl"]).tile) == (1, 28)
    with pytest.raises(UserError, match="it says of its images what is not understood"):
        ImageRules.of({"family": "x"}, "it")


@pytest.mark.parametrize(
    ("file", "change", "limits", "reason"),
    [
        ("config.json", {"model_type": "llama"}, {}, "its config.json says llama"),
        ("config.json", {"image_token_id": None}, {}, "has no image_token_id"),
        ("config.json", {"vision_config": {"patch_size": 9}}, {}, "patch_size = 9, the image processor 7"),
        ("preprocessor_config.json", {"do_normalize": False}, {}, "do_normalize = False"),
        ("preprocessor_config.json", {"image_processor_type": "LlavaProcessor"}, {}, "is a LlavaProcessor"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, {}, "rescale_factor = 1.0"),
        ("config.json", {}, {"max_tiles": 3}, "`max_tiles` is no limit of qwen2_vl"),
        ("config.json", {}, {"max_pixels": 10}, "`max_pixels` 10: it must be at least 196"),
    ],
)
def test_what_is_not_understood_of_a_directory_is_refused(tmp_path, file, change, limits, reason):
    folder = save_model(tmp_path, "qwen2_vl")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        rules_of(folder, **limits)
