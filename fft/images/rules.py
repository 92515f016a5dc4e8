"""What a family of models makes of images: read from a model's directory once, and kept in a table's manifest."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fft.errors import UserError, one_line
from fft.json_text import json_value

#: Families whose images become one grid of patches each, of a size between two limits.
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
#: Families whose images are cut into square tiles of one size.
TILES = ("internvl",)
#: All whose images are read.
FAMILIES = (*GRIDS, *TILES)

#: Files of a model directory that say what becomes of images.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_CONFIG = "config.json"
#: The type of InternVL's published directories, which say elsewhere what becomes of images.
_ORIGINAL = "internvl_chat"
_PROCESSOR_OF = {**dict.fromkeys(GRIDS, "Qwen2VLImageProcessor"), **dict.fromkeys(TILES, "GotOcr2ImageProcessor")}
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
#: Settings of image processors, and the one value of each that is computed here.
_ONLY = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False}
_ONLY |= {"do_pad": False}
#: What transformers' processors do where their files do not say.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3
_FEWEST_PIXELS, _MOST_PIXELS = 56 * 56, 28 * 28 * 1280
_MOST_TILES = 12
#: No size, count or id is as large.
_LARGEST = 1 << 62


#: Limits that may be given, and what they do.
LIMITS = {
    "max_pixels": "shrink larger images to this many pixels",
    "min_pixels": "enlarge smaller images to this many pixels",
    "max_tiles": "cut an image into this many tiles at most, for InternVL",
}


@dataclass(frozen=True)
class ImageRules:
    """How images become patches and tokens, the facts ``vision`` of a manifest.

    ``patch`` pixels are a side of a patch, ``merge`` x ``merge`` patches a token; the tower takes ``temporal`` equal
    frames of a still. Of :data:`GRIDS`, images have ``min_pixels`` to ``max_pixels`` pixels; of :data:`TILES`,
    ``min_tiles`` to ``max_tiles`` tiles of ``tile`` x ``tile`` pixels, and a small picture of the whole where these are
    several. What the other kind says is 0. ``mean`` and ``std`` normalise pixels from 0 to 1; ``resample`` is Pillow's
    number. ``image_token`` is the id that stands once for each token of an image, between ``start_token`` and
    ``end_token``.
    """

    family: str
    patch: int
    merge: int
    temporal: int
    image_token: int
    start_token: int
    end_token: int
    min_pixels: int = 0
    max_pixels: int = 0
    tile: int = 0
    min_tiles: int = 0
    max_tiles: int = 0
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    resample: int = _BICUBIC

    @property
    def factor(self) -> int:
        """Pixels of a side of a token's square."""
        return self.patch * self.merge

    def facts(self) -> dict[str, Any]:
        """As a manifest has them."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def of(cls, facts: Mapping[str, Any], where: str) -> "ImageRules":
        """From a manifest's facts. Raises :class:`UserError` naming ``where`` when they are none."""
        try:
            given: dict[str, Any] = {**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])}
            return _checked(cls(**given))
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{where} says of its images what is not understood ({error!r}): write the table again, or upgrade "
                "flash-fine-tuning."
            ) from error


@dataclass(frozen=True)
class ImageLimits:
    """Limits that are given in the place of those of a model's directory."""

    max_pixels: int | None = None
    min_pixels: int | None = None
    max_tiles: int | None = None

    @property
    def given(self) -> list[str]:
        """Names of those that are given."""
        return [name for name in LIMITS if getattr(self, name) is not None]


@dataclass(frozen=True)
class ImageSettings:
    """That images are read: those in files from ``folder``, an absolute path."""

    folder: str
    limits: ImageLimits = field(default_factory=ImageLimits)


#: What must be the same for a table's tokens and patches to be those that a model takes.
_SHARED = ("image_token", "start_token", "end_token", "patch", "merge", "temporal", "tile", "mean", "std", "resample")


def _checked(rules: ImageRules) -> ImageRules:
    """The same. Raises TypeError where one of them is no size, place or colour."""
    for name, value in asdict(rules).items():
        least = int(name in ("patch", "merge", "temporal"))
        if isinstance(value, tuple):
            fits = len(value) == 3 and all(isinstance(one, int | float) for one in value)
        else:
            fits = isinstance(value, str) if name == "family" else type(value) is int and least <= value < _LARGEST
        if not fits:
            raise TypeError(f"{name} is {value!r}")
    return rules


def check_rules(rules: ImageRules, model: ImageRules, table: str) -> None:
    """Raise :class:`UserError`, naming the first that differs, where the images of a ``table`` that was made by
    ``rules`` are not those of a model that has other ones. Limits of sizes may differ: grids are the table's."""
    kinds = {True: "grids of patches", False: "tiles"}
    own, other = rules.family in GRIDS, model.family in GRIDS
    if own != other:
        raise UserError(
            f"{table} has images as {kinds[own]}, made for {rules.family}; the model, of type {model.family}, takes "
            f"{kinds[other]}: make the table with the model's own directory as --tokenizer."
        )
    for name in _SHARED:
        if getattr(rules, name) != getattr(model, name):
            raise UserError(
                f"{table} was made with {name} = {getattr(rules, name)} of images, the model has "
                f"{getattr(model, name)}: make the table with the model's own directory as --tokenizer."
            )


def load_rules(directory: Path, limits: ImageLimits, around: tuple[int, int]) -> ImageRules:
    """The rules of a model's directory. ``around`` are the ids that a tokenizer of :data:`TILES` puts around an image.

    Raises :class:`UserError` for a model without images, or of a family or with settings that are not understood, for
    limits that it does not know, and where Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError("images need Pillow: pip install pillow.")
    config = read_object(directory / _CONFIG)
    family = config.get("model_type")
    if family == _ORIGINAL:
        raise UserError(
            f"`tokenizer` {directory} is InternVL in the form of its own code: give what python -m "
            f"fft.checkpoint.convert {directory} OUT makes of it."
        )
    if not isinstance(family, str) or family not in _PROCESSOR_OF:
        raise UserError(
            f"`tokenizer` {directory}: images are read for models of type {', '.join(_PROCESSOR_OF)}; its {_CONFIG} "
            f"says {family or 'none'}: give the whole directory of such a model, or leave out `image_path`."
        )
    try:
        return _checked(_rules(directory, config, limits, around))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"`tokenizer` {directory}: settings of its images are none that is understood "
            f"({one_line(error)[:120]}): restore the directory."
        ) from error


def _rules(directory: Path, config: Mapping[str, Any], limits: ImageLimits, around: tuple[int, int]) -> ImageRules:
    family = config["model_type"]
    settings = _settings(directory, family)
    for name in ("max_tiles",) if family in GRIDS else ("max_pixels", "min_pixels"):
        if getattr(limits, name) is not None:
            own = "`max_pixels` and `min_pixels`" if family in GRIDS else "`max_tiles`"
            raise UserError(f"`{name}` is no limit of {family}, which has {own}: leave it out.")
    if family in GRIDS:
        return _grid_rules(directory, config, settings, limits)
    return _tile_rules(directory, config, settings, limits.max_tiles, around)


def has_processor(directory: Path) -> bool:
    """Whether a model's directory says how images are made into patches."""
    return any((directory / name).is_file() for name in (PREPROCESSOR, PROCESSOR))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON, empty where there is no file. Raises :class:`UserError` for other content."""
    try:
        value = json_value(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): restore it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: restore it.")
    return value


def _settings(directory: Path, family: str) -> dict[str, Any]:
    """The image processor's settings, from where transformers takes them."""
    settings = read_object(directory / PROCESSOR).get("image_processor") or read_object(directory / PREPROCESSOR)
    where = f"`tokenizer` {directory}: the image processor"
    if not settings:
        raise UserError(f"`tokenizer` {directory} has no {PREPROCESSOR}: give the whole directory of the model.")
    kind = str(settings.get("image_processor_type", _PROCESSOR_OF[family]))
    if kind.removesuffix("Fast").removesuffix("Pil") != _PROCESSOR_OF[family]:
        raise UserError(f"{where} is a {kind}, which is not understood: {family} has a {_PROCESSOR_OF[family]}.")
    for name, only in _ONLY.items():
        if settings.get(name) not in (None, only):
            raise UserError(f"{where} has {name} = {settings[name]}, which is not supported: set it to {only}.")
    if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-9:
        raise UserError(f"{where} has rescale_factor = {settings['rescale_factor']}: only 1/255 is supported.")
    return settings


def _grid_rules(
    directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any], limits: ImageLimits
) -> ImageRules:
    vision, size = config.get("vision_config") or {}, settings.get("size") or {}
    least = _first(limits.min_pixels, settings.get("min_pixels"), size.get("shortest_edge"), _FEWEST_PIXELS)
    most = _first(limits.max_pixels, settings.get("max_pixels"), size.get("longest_edge"), _MOST_PIXELS)
    patch = settings.get("patch_size", 14)
    rules = ImageRules(
        config["model_type"],
        patch,
        settings.get("merge_size", 2),
        settings.get("temporal_patch_size", 2),
        *(_token(directory, config, name) for name in _TOKENS),
        min_pixels=least,
        max_pixels=most,
        **_colours(settings),
    )
    for name, own in (("patch_size", rules.patch), ("spatial_merge_size", rules.merge)):
        if vision.get(name, own) != own:
            raise UserError(
                f"`tokenizer` {directory}: {_CONFIG} says {name} = {vision[name]}, the image processor {own}: restore "
                "the directory."
            )
    if not rules.factor**2 <= most or least > most:
        raise UserError(
            f"`max_pixels` {most}: it must be at least {rules.factor**2}, a token's, and at least `min_pixels` {least}."
        )
    return rules


def _tile_rules(
    directory: Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    max_tiles: int | None,
    around: tuple[int, int],
) -> ImageRules:
    vision, size = config.get("vision_config") or {}, settings.get("size") or {}
    tile, patch = _square(vision.get("image_size", 448)), _square(vision.get("patch_size", 14))
    merge, rest = divmod(1, config.get("downsample_ratio", 0.5))
    if size.get("height", tile) != tile or size.get("width", tile) != tile or rest or tile % (patch * int(merge)):
        raise UserError(
            f"`tokenizer` {directory}: {_CONFIG} says tiles of {tile} pixels and patches of {patch}, the image "
            f"processor {dict(size)}: restore the directory."
        )
    least, most = settings.get("min_patches", 1), _first(max_tiles, settings.get("max_patches"), _MOST_TILES)
    if most < least:
        raise UserError(f"`max_tiles` {most}: the model's fewest tiles are {least}.")
    rules = ImageRules(
        config["model_type"],
        patch,
        int(merge),
        1,
        _token(directory, config, "image_token_id"),
        *around,
        tile=tile,
        min_tiles=least,
        max_tiles=most,
        **_colours(settings),
    )
    written = read_object(directory / PROCESSOR).get("image_seq_length", config.get("image_seq_length"))
    if written not in (None, (tile // rules.factor) ** 2):
        raise UserError(
            f"`tokenizer` {directory} has image_seq_length = {written}, but a tile of {tile} pixels is "
            f"{(tile // rules.factor) ** 2} tokens: restore the directory."
        )
    return rules


def _first(*values: int | None) -> int:
    return next(int(value) for value in values if value is not None)


def _square(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def _token(directory: Path, config: Mapping[str, Any], name: str) -> int:
    if not isinstance(config.get(name), int):
        raise UserError(f"`tokenizer` {directory}: its {_CONFIG} has no {name}: restore it.")
    return config[name]


def _colours(settings: Mapping[str, Any]) -> dict[str, Any]:
    mean, std = settings.get("image_mean") or _MEAN, settings.get("image_std") or _STD
    return {"mean": tuple(mean), "std": tuple(std), "resample": int(settings.get("resample") or _BICUBIC)}
