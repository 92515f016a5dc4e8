"""Models that see images: which there are, and where a model has its decoder and its tower."""

from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from fft.images.rules import GRIDS, ImageRules

#: Model types with a vision tower that are trained. Of the parts of the base model besides its decoder, the tower is
#: the first; another one makes the decoder's hidden states of what it gives.
PARTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), ("visual",)),
    "internvl": ("vision_tower", "multi_modal_projector"),
}
#: Types of the decoders within them that no language model has.
DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
#: What those models call their decoder.
_DECODER = "language_model"


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The class of transformers that makes a model of ``config``."""
    return AutoModelForImageTextToText if config.model_type in PARTS else AutoModelForCausalLM


def decoder_path(model: PreTrainedModel) -> str:
    """The name of the decoder within ``model``: what has its embedding, layers and norm."""
    base = model.base_model_prefix
    return f"{base}.{_DECODER}" if model.config.model_type in PARTS else base


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder itself."""
    return cast(PreTrainedModel, model.get_submodule(decoder_path(model)))


def tower_of(model: PreTrainedModel) -> nn.Module | None:
    """The vision tower; None of a model that sees no images."""
    parts = vision_parts(model)
    return model.get_submodule(parts[0]) if parts else None


def vision_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """The names within ``model`` of what makes hidden states of images: the tower first, nothing without one."""
    return tuple(f"{model.base_model_prefix}.{name}" for name in PARTS.get(model.config.model_type, ()))


def rules_of(config: PretrainedConfig, rules: ImageRules) -> ImageRules:
    """``rules`` with all that the model's config says of images in their place."""
    vision = config.vision_config
    facts: dict[str, Any] = {"family": config.model_type, "image_token": config.image_token_id}
    if config.model_type in GRIDS:
        facts |= {"patch": vision.patch_size, "merge": vision.spatial_merge_size}
        facts |= {"temporal": vision.temporal_patch_size}
        facts |= {"start_token": config.vision_start_token_id, "end_token": config.vision_end_token_id}
    else:
        facts |= {"patch": vision.patch_size[0], "tile": vision.image_size[0]}
        facts |= {"merge": round(1 / config.downsample_ratio), "temporal": 1}
    return replace(rules, **facts)
