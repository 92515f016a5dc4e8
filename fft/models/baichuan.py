"""Baichuan's models that no architecture of transformers is: those with ALiBi (13B), and Baichuan 2's output head.

All else about them is Llama's, and is done by transformers' Llama modules. Files keep queries, keys and values in one
tensor, ``W_pack``; config and weights are read, and written, as the published ones are. Baichuan-7B, which is a Llama,
becomes one: see :mod:`fft.weights.originals`.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.modeling_outputs import BaseModelOutputWithPast

from fft.ops.alibi import alibi_slopes
from fft.weights.originals import SECOND_VOCABULARY


@strict
class BaichuanConfig(LlamaConfig):
    """A ``config.json`` of Baichuan's: without ``max_position_embeddings`` positions are ALiBi's (13B).

    ``z_loss_weight`` is an entry of Baichuan 2's alone, whose head is normalized.
    """

    model_type = "baichuan"
    vocab_size: int = 64000
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    max_position_embeddings: int | None = None  # pyrefly: ignore[bad-override-mutable-attribute] # 13B's have none
    model_max_length: int | None = 4096
    z_loss_weight: int | float | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.z_loss_weight is None and self.vocab_size == SECOND_VOCABULARY:
            self.z_loss_weight = 0
        super().__post_init__(**kwargs)

    @property
    def alibi(self) -> bool:
        """Whether scores fall with the distance, and nothing is turned."""
        return self.max_position_embeddings is None

    @property
    def normalized_head(self) -> bool:
        """Whether the output head's rows have length 1."""
        return self.z_loss_weight is not None


class NormalizedHead(nn.Linear):
    """An output head that multiplies by its rows as they are with length 1, whatever they have grown to."""

    def rows(self) -> Tensor:
        """[vocabulary, hidden size], each row of length 1; gradients go through the division."""
        return F.normalize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Logits."""
        return F.linear(input, self.rows())


class Unturned(nn.Module):
    """In the place of a rotary embedding: turns nothing."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.width = config.head_dim or config.hidden_size // config.num_attention_heads

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines 1 and sines 0 [rows, tokens, head size], in the type of ``x``."""
        cosines = x.new_ones(*position_ids.shape, self.width)
        return cosines, torch.zeros_like(cosines)


class BaichuanModel(LlamaModel):
    """A Llama, or with ``config.alibi`` one whose mask has ALiBi."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.slopes = alibi_slopes(config.num_attention_heads)
        if config.alibi:
            self.add_module("rotary_emb", Unturned(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' models are called; ``attention_mask`` [rows, tokens] says which tokens count."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.alibi:
            before = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = self._mask(inputs_embeds, attention_mask, before)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **options,
        )

    def _mask(self, hidden: Tensor, counts: Tensor | None, before: int) -> Tensor:
        """What is added to scores [rows, heads, tokens, keys]: slope * (key - query), or next to -inf."""
        keys = torch.arange(before + hidden.shape[1], device=hidden.device)
        distance = keys - keys[before:, None]
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=hidden.device)
        seen = (distance <= 0)[None]
        if counts is not None:
            seen = seen & counts[:, None, : len(keys)].bool()
        added = (slopes[:, None, None] * distance)[None].to(hidden.dtype)
        return added.masked_fill(~seen[:, None], torch.finfo(hidden.dtype).min)


class BaichuanForCausalLM(LlamaForCausalLM):
    """With a normalized head where its config has one."""

    config_class = BaichuanConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        if config.normalized_head:
            self.lm_head = NormalizedHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


_PARTS = [f"self_attn.{name}_proj.weight" for name in "qkv"]
AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
register_checkpoint_conversion_mapping(
    "baichuan", [WeightConverter("self_attn.W_pack.weight", _PARTS, [Chunk(dim=0)])], overwrite=True
)
