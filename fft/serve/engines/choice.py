"""Load a model directory into the engine that is asked for."""

from fft.serve.engines import Engine, EngineOptions
from fft.serve.engines.checked import CheckedModel, check_model


def start_engine(model: CheckedModel, limit: int | None = None) -> Engine:
    """Load the weights; prompt and answer will have at most ``limit`` tokens, by default what the model can take.

    Raises :class:`UserError` for weights that cannot be loaded, and when vLLM cannot start.
    """
    if model.engine == "vllm":
        from fft.serve.engines.vllm_engine import VllmEngine

        return VllmEngine(model, limit or model.limit)
    from fft.serve.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, limit or model.limit)


def load_engine(model: str, options: EngineOptions | None = None) -> Engine:
    """:func:`start_engine` of :func:`check_model`; raises :class:`UserError` as these do."""
    return start_engine(check_model(model, options))
