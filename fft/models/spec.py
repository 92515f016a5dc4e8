"""What a model is, before any of it has memory: the same on every rank, and never changed."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fft.errors import UserError, one_line
from fft.images.rules import ImageRules
from fft.models.experts import Routing
from fft.models.four_bits import hold_in_four_bits
from fft.models.lora import Lora, adapt, freeze
from fft.models.outside import Outside
from fft.models.recurrent import separate_documents
from fft.models.stored import stored_names
from fft.models.trial import embedding_and_norm, try_out
from fft.models.vision import auto_class, decoder_path, tower_of, vision_parts
from fft.ops.alibi import COLUMNS, alibi_slopes
from fft.ops.attention import register_with_transformers
from fft.ops.experts import asks_interface
from fft.ops.fused import FusedOps, fuse
from fft.ops.vision_attention import attend_so
from fft.parallel.tensor_plan import Shard, expert_shard, heads_of, plan_of, shard_of
from fft.weights.names import StoredNames

#: The types that ``--dtype`` names.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelSpec:
    """A model: its config, what is trained of it and in which type, and the kernels that compute it.

    ``attention`` names the attention kernel, see :func:`fft.ops.backends.choice.choose`; ``fused`` are other kernels.
    With ``images`` it sees those that such rules made; otherwise the tower of a model that could is left as it is.
    With ``shared_tower`` every stage has it whole, and none of its layers is one of the pipeline.
    With ``lora`` adapters alone are trained; ``frozen`` are patterns as :func:`fft.models.lora.freeze` takes them.
    With ``four_bits`` the linear layers of decoder layers, frozen, are held so: :mod:`fft.models.four_bits`.
    ``selective`` is for :mod:`fft.models.recompute`, ``compiler`` is the backend of torch.compile for decoder layers.
    What is not read from files has its first values from ``seed``.
    Raises :class:`UserError` where ``lora`` or ``frozen`` name what the model does not have, and for a config of which
    transformers can make no model, or none that runs.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    seed: int = 0
    attention: str = "auto"
    fused: FusedOps | None = None
    lora: Lora | None = None
    frozen: str | None = None
    selective: bool = False
    compiler: str | None = None
    images: ImageRules | None = None
    shared_tower: bool = False
    four_bits: bool = False
    #: Names of the weights that are held in four bits.
    packed: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())
    #: The whole model on the meta device (shapes, no memory), which nobody changes: modules are built from copies.
    skeleton: PreTrainedModel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        config = copy.deepcopy(self.config)  # transformers writes into it
        attention = register_with_transformers()
        implementations = {"": attention, "text_config": attention, "vision_config": "sdpa"}
        try:
            with torch.device("meta"):
                model = auto_class(config).from_config(
                    config, dtype=self.dtype, attn_implementation=implementations, trust_remote_code=False
                )
        except Exception as error:  # modules raise what their sizes and settings happen to make them raise
            raise UserError(
                f"transformers cannot build a {config.model_type} of the model's config.json "
                f"({type(error).__name__}: {one_line(error)[:200]}): correct it."
            ) from error
        if (tower := tower_of(model)) is not None:
            attend_so(tower)
        model.to("meta")  # some modules make parameters elsewhere
        _keep_fp32(model)
        separate_documents(model)
        try_out(model)
        if self.lora is not None:
            seen = () if self.images is None else vision_parts(model)
            adapt(model, f"{decoder_path(model)}.layers", self.lora, seen)
        if self.four_bits:
            object.__setattr__(self, "packed", hold_in_four_bits(model, f"{decoder_path(model)}.layers"))
        if self.frozen:
            freeze(model, self.frozen)
        if self.fused is not None:
            fuse(model, self.fused)
        object.__setattr__(self, "skeleton", model)

    @property
    def base(self) -> str:
        """Name of the decoder inside the model, ``model`` for most."""
        return decoder_path(self.skeleton)

    @property
    def text(self) -> PretrainedConfig:
        """The config of the decoder: all of it, or a part of that of a model that sees images."""
        return self.config.get_text_config()

    @property
    def head_size(self) -> int:
        """Width of an attention head, that of keys or that of values if it is more."""
        config = self.text
        if getattr(config, "kv_lora_rank", None):
            return max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many tokens a query of a decoder layer sees at most; None: all before it."""
        kinds = getattr(self.text, "layer_types", None)
        slides = kinds[layer] == "sliding_attention" if kinds else True
        return getattr(self.text, "sliding_window", None) if slides else None

    @property
    def tower_width(self) -> int:
        """Hidden size of the tower, of a model that has one."""
        vision = self.config.vision_config
        return getattr(vision, "embed_dim", None) or vision.hidden_size

    @property
    def tower_head_size(self) -> int:
        """Width of a head of the tower, of a model that has one."""
        vision = self.config.vision_config
        return self.tower_width // (getattr(vision, "num_heads", None) or vision.num_attention_heads)

    @property
    def attended_size(self) -> int:
        """Width of a head as attention kernels see it."""
        return self.head_size + (COLUMNS if getattr(self.config, "alibi", False) else 0)

    @property
    def caps_scores(self) -> bool:
        """Whether attention scores are capped, which not all kernels can."""
        return getattr(self.config, "attn_logit_softcapping", None) is not None

    def slopes(self, rank: int = 0, size: int = 1) -> tuple[float, ...] | None:
        """ALiBi's slopes of the heads that a tensor-parallel rank of ``size`` has; None for other positions."""
        if not getattr(self.config, "alibi", False):
            return None
        heads = self.config.num_attention_heads
        return alibi_slopes(heads)[heads * rank // size : heads * (rank + 1) // size]

    @property
    def apart(self) -> tuple[str, ...]:
        """Names of the modules that take no part in training, and are written as they were."""
        return () if self.images is not None else vision_parts(self.skeleton)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def head(self) -> str:
        """Name of the output head's weight."""
        return f"{self.embedding if self.tied else self.output}.weight"

    @cached_property
    def embedding(self) -> str:
        """Name of the embedding's module."""
        return f"{self.base}.{embedding_and_norm(self.text)[0]}"

    @cached_property
    def norm(self) -> str:
        """Name of the module that normalises what the last layer gives."""
        return f"{self.base}.{embedding_and_norm(self.text)[1]}"

    @cached_property
    def output(self) -> str:
        """Name of the output head's module, which a tied model has, too."""
        head = self.skeleton.get_output_embeddings()
        return next(name for name, module in self.skeleton.named_modules() if module is head)

    @cached_property
    def outside(self) -> Outside:
        """What is done between embedding, layers and head. Raises :class:`UserError` for nonsense in the config."""
        return Outside.of(self.text)

    @cached_property
    def routing(self) -> Routing | None:
        """The routers whose experts a loss keeps in balance; None without such."""
        return Routing.of(self.skeleton)

    @property
    def experts_per_token(self) -> int:
        """How many experts a token goes through; 1 without any."""
        names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
        return next((found for name in names if (found := getattr(self.text, name, None))), 1)

    @cached_property
    def experts(self) -> frozenset[str]:
        """Names of the parameters of experts, [experts, ...], that ranks may share out by expert."""
        found = set()
        for path, module in self.skeleton.named_modules():
            if asks_interface(module):
                own = module.named_parameters(recurse=False)
                found |= {f"{path}.{name}" for name, p in own if p.ndim > 1 and len(p) == module.num_experts}
        return frozenset(found)

    @cached_property
    def plan(self) -> Mapping[str, str]:
        """What tensor parallelism cuts, and how: see :func:`fft.parallel.tensor_plan.plan_of`."""
        return plan_of(self.text)

    @cached_property
    def stored(self) -> StoredNames:
        """How files store the model's parameters. Raises :class:`UserError` where that is not known."""
        return stored_names(self.skeleton)

    def within(self, path: str) -> str:
        """A dotted name of the model, relative to the decoder, as plans have it."""
        return path.removeprefix(f"{self.base}.")

    def shards(self, rank: int, size: int, expert: tuple[int, int] = (0, 1)) -> dict[str, Shard]:
        """By name, the parts of all parameters of which a tensor-parallel rank of ``size`` holds a part only.

        ``expert`` is the rank, and how many there are, among those that share out experts.
        """
        heads, found = heads_of(self.text), {}
        for name, parameter in self.skeleton.named_parameters() if size > 1 or expert[1] > 1 else ():
            shape = tuple(parameter.shape)
            shard = shard_of(self.within(name), shape, self.plan, heads, rank, size)
            if expert[1] > 1 and name in self.experts:
                shard = expert_shard(shape, *expert, shard)
            if shard is not None:
                found[name] = shard
        return found


def _keep_fp32(model: PreTrainedModel) -> None:
    """Hold the stored buffers in fp32 of which transformers says so, such as the biases that balance experts.

    What transformers makes a parameter and never trains is a buffer here, which optimizers and casts leave alone.
    """
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for path, module in model.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach().float())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and any(p in f"{path}.{name}" for p in patterns):
                module._buffers[name] = buffer.float()


def copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module of a spec's skeleton, to be changed; configs are shared."""
    configs = [child.config for child in module.modules() if hasattr(child, "config")]
    return copy.deepcopy(module, {id(config): config for config in configs})


def cut(module: nn.Module, path: str, shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """Make the parameters below ``module``, on the meta device, as small as the parts in ``shards``, by full name.

    Returns the parts made, by names within the module.
    """
    made = {}
    for name, child in module.named_modules():
        for key, parameter in child.named_parameters(recurse=False):
            within = f"{name}.{key}" if name else key
            shard = shards.get(f"{path}.{within}")
            if shard is not None:
                made[within] = shard
                local = parameter.new_empty(shard.local_shape)
                child._parameters[key] = nn.Parameter(local, parameter.requires_grad)
    return made
