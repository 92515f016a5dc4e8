"""Can a model be run at all? Its embedding, decoder layers and norm are tried with two tokens on the meta device.

Configs are checked when they are read, but not all that they say: sizes that do not meet show where they should.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fft.errors import UserError, one_line
from fft.models.rotary import Rotary, map_turns
from fft.models.vision import decoder_of
from fft.ops.backends import Backend
from fft.ops.documents import Documents, Softmax
from fft.ops.sequence_parallel import PLAIN, SequenceParallel, ShardedDocuments
from fft.parallel.ring_plan import TokenShards, plan_shards

_TOKENS = 2


def embedding_and_norm(config: PretrainedConfig) -> tuple[str, str]:
    """What the modules before the first decoder layer and after the last are called within the decoder.

    They begin and end the plan that the config publishes for pipelines; without one they are called as Llama's.
    """
    first, *_, last = config.base_model_pp_plan or ("embed_tokens", "norm")
    return first, last


@torch.no_grad()
def try_out(model: PreTrainedModel) -> None:
    """Raise :class:`UserError` where ``model``, on the meta device, cannot be run."""
    try:
        base = decoder_of(model)
        embedding, norm = map(base.get_submodule, embedding_and_norm(base.config))
        rotary, tried = Rotary(model), {}
        for index, layer in enumerate(base.get_submodule("layers").children()):
            kind = rotary.kind(index)
            tried[kind, *((name, *p.shape) for name, p in layer.named_parameters())] = kind, layer
        positions, row = torch.arange(_TOKENS)[None], Documents.of((0, _TOKENS), "meta")
        documents = ShardedDocuments(row, plan_shards(row.bounds, 1), _Shapes())
        hidden = embedding(torch.zeros(1, _TOKENS, dtype=torch.int32, device="meta"))
        for kind, layer in tried.values():
            layer, inputs = _in_bf16(layer), hidden.bfloat16()
            turns = rotary.turns(torch.empty(0, dtype=torch.bfloat16), positions, kind)
            outputs = layer(
                inputs,
                attention_mask=None,
                position_ids=positions.to("meta"),
                position_embeddings=map_turns(turns, lambda x: x.to("meta")),
                documents=documents,
            )
            if outputs.shape != inputs.shape:
                raise ValueError(f"a layer makes {tuple(outputs.shape)} of {tuple(inputs.shape)}")
        norm(hidden)
    except NotImplementedError:  # an operator whose shapes depend on values: it is met when it runs
        return
    except Exception as error:  # modules raise what their sizes and settings happen to make them raise
        raise UserError(
            f"a {model.config.model_type} of the model's config.json cannot be run ({type(error).__name__}: "
            f"{one_line(error)[:200]}): correct it."
        ) from error


def _in_bf16(layer: nn.Module) -> nn.Module:
    """A copy: on the meta device torch's grouped product of experts knows bf16 alone."""
    configs = [child.config for child in layer.modules() if hasattr(child, "config")]
    return copy.deepcopy(layer, {id(config): config for config in configs}).to(torch.bfloat16)


class _Shapes(SequenceParallel):
    """The only rank of a row, with attention that returns shapes."""

    def __init__(self) -> None:
        pass

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: TokenShards,
        scale: float,
        backend: Backend | None = None,
        softmax: Softmax = PLAIN,
    ) -> Tensor:
        """Raises ValueError for what attention kernels do not take."""
        if not q.shape[-1] == k.shape[-1] == v.shape[-1] or k.shape != v.shape or q.shape[1] % k.shape[1]:
            raise ValueError(f"attention of {tuple(q.shape)} to keys {tuple(k.shape)} and values {tuple(v.shape)}")
        return torch.empty_like(q)
