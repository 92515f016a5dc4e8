"""What a model does between its embedding, its layers and its head: factors, and a cap on logits.

transformers has this in the forward of its models and nowhere else: what is here was read there, family by family.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from fft.errors import UserError

#: Settings that mean such a thing in some family.
SETTINGS = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping")

_GRANITE = ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared")
_Value = Callable[[PretrainedConfig], float]
#: What embeddings are multiplied by.
_EMBEDDING: dict[str, _Value] = {
    **dict.fromkeys((*_GRANITE, "hyperclovax"), lambda config: config.embedding_multiplier),
    "afmoe": lambda config: config.hidden_size**0.5 if config.mup_enabled else 1.0,
}
#: What logits are multiplied by.
_LOGITS: dict[str, _Value] = {
    **dict.fromkeys((*_GRANITE, "minicpm3"), lambda config: 1 / config.logits_scaling),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), lambda config: config.logit_scale),
    "hyperclovax": lambda config: config.logits_scaling,
}
#: Families whose logits are capped by ``final_logit_softcapping``.
_CAPPED = ("gemma2", "gemma3_text", "vaultgemma")


@dataclass(frozen=True)
class Outside:
    """What multiplies embeddings, and logits; with a ``cap`` c they are c * tanh(logits / c)."""

    embedding: float = 1.0
    logits: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Outside":
        """What a config says. Raises :class:`UserError` for a setting that means nothing here."""
        name = config.model_type
        cap = getattr(config, "final_logit_softcapping", None) if name in _CAPPED else None
        try:
            found = cls(
                float(_EMBEDDING.get(name, lambda _: 1.0)(config)),
                float(_LOGITS.get(name, lambda _: 1.0)(config)),
                None if cap is None else float(cap),
            )
        except (TypeError, ValueError, ZeroDivisionError) as error:
            settings = ", ".join(f"{key} {getattr(config, key)!r}" for key in SETTINGS if hasattr(config, key))
            raise UserError(f"{settings} in the model's config.json must be numbers other than 0.") from error
        if found.cap is not None and found.cap <= 0:
            raise UserError(f"final_logit_softcapping {cap} in the model's config.json must be more than 0, or null.")
        return found


def check_outside(config: PretrainedConfig) -> None:
    """Raise :class:`UserError` for settings that another family would obey, and this one does not know."""
    name = config.model_type
    known = {
        "embedding_multiplier": name in _EMBEDDING,
        "logits_scaling": name in _LOGITS,
        "logit_scale": name in _LOGITS,
        "final_logit_softcapping": name in _CAPPED,
    }
    for key, is_known in known.items():
        if not is_known and getattr(config, key, None) not in (None, 1):
            raise UserError(
                f"model type {name!r} scales or caps outside its layers ({key} {getattr(config, key)} in its "
                "config.json), which is not known of it here: use another model."
            )
    Outside.of(config)
