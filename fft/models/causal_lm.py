"""Any Hugging Face decoder as a list of pipeline layers, built from transformers' own modules.

The model is laid out once on the meta device (shapes, no memory); each rank then materialises only the modules of its
stage and fills them parameter by parameter, from safetensors or from a seed. Between layers travel the hidden states
[1, tokens, hidden size], the only floating tensor, and the document boundaries, int32 [tokens + 1].
"""

from copy import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fft.checkpoint.adapter import AdapterReader
from fft.models.experts import LoadBalance
from fft.models.lora import Lora, adapt, freeze, is_adapter, reset_adapter, seed_of
from fft.ops.attention import register_with_transformers
from fft.ops.fused import FusedOps, fuse
from fft.ops.sequence_parallel import SequenceParallel
from fft.parallel.tensor import TensorParallel, parallelise
from fft.parallel.tensor_plan import Shard, plan_of, shard_of
from fft.weights.hf import WeightReader


@dataclass
class ModelSource:
    """Where the modules and weights of a model come from: its config, and a weight reader or a seed.

    ``attention`` names the attention kernel, see :func:`fft.ops.backends.choice.choose`; ``fused`` are other kernels.
    ``tensor`` is set, before layers are built, where every rank holds a part of a layer's parameters; ``parallel``,
    before the first forward, where it holds a share of a row's tokens. ``balance`` is there for mixtures of experts.
    With ``lora`` adapters alone are trained, from ``adapter`` or, without it, from the seed; ``frozen`` are patterns as
    :func:`fft.models.lora.freeze` takes them. ``selective`` is for :mod:`fft.models.recompute`.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    weights: WeightReader | None = None
    seed: int = 0
    attention: str = "auto"
    fused: FusedOps | None = None
    tensor: TensorParallel | None = None
    parallel: SequenceParallel | None = None
    lora: Lora | None = None
    adapter: AdapterReader | None = None
    frozen: str | None = None
    selective: bool = False
    balance: LoadBalance | None = field(init=False, default=None)
    skeleton: PreTrainedModel = field(init=False)
    #: Parts of parameters that this rank holds, by full name; what is not here it holds whole.
    shards: dict[str, Shard] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.config._attn_implementation = register_with_transformers()
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        self.skeleton.config._attn_implementation = register_with_transformers()
        if self.lora is not None:
            adapt(self.skeleton, f"{self.base}.layers", self.lora)
        if self.frozen:
            freeze(self.skeleton, self.frozen)
        self.plan = plan_of(self.config)
        routed = sum(name.endswith("mlp.gate") for name, _ in self.skeleton.named_modules())
        if routed:
            self.balance = LoadBalance(self.config, routed)
        if self.fused is not None:
            fuse(self.skeleton, self.fused)

    @property
    def base(self) -> str:
        """Name of the decoder inside the model, ``model`` for most."""
        return self.skeleton.base_model_prefix

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get_text_config().tie_word_embeddings)

    @property
    def head_shard(self) -> Shard | None:
        """This rank's part of the output head, of the last stage; None where it has all of it."""
        return self.shards.get(f"{self.base}.embed_tokens.weight" if self.tied else "lm_head.weight")

    def build(self, path: str, module: nn.Module | None = None) -> nn.Module:
        """Materialise the module at ``path`` (a dotted name within the model), this rank's part of it, on the CPU.

        ``module`` stands for the one at ``path`` where only some of its children are wanted.
        """
        module = module or self.skeleton.get_submodule(path)
        shards = {}
        if self.tensor is not None:
            shards = self.cut(module, path, self.tensor.rank, self.tensor.size)
            self.shards.update({f"{path}.{name}": shard for name, shard in shards.items()})
        module.to_empty(device="cpu")
        self._fill(module, path)
        if self.tensor is not None:
            parallelise(module, self._relative(path), self.plan, shards, self.tensor)
        return module

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self.base}.")

    def shard(self, name: str, shape: tuple[int, ...], rank: int, size: int) -> Shard | None:
        """The part of a parameter of ``shape`` that a tensor-parallel rank of ``size`` holds, None for all of it."""
        heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return shard_of(self._relative(name), shape, self.plan, heads, rank, size)

    def cut(self, module: nn.Module, path: str, rank: int, size: int) -> dict[str, Shard]:
        """Make the parameters below ``module``, on the meta device, as small as the parts of ``rank`` of ``size``.

        Returns the parts, by names within the module.
        """
        shards = {}
        for name, child in module.named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                within = f"{name}.{key}" if name else key
                shard = self.shard(f"{path}.{within}", tuple(parameter.shape), rank, size)
                if shard is not None:
                    shards[within] = shard
                    part = parameter.new_empty(shard.local_shape)
                    child._parameters[key] = nn.Parameter(part, parameter.requires_grad)
        return shards

    @torch.no_grad()
    def _fill(self, module: nn.Module, path: str) -> None:
        """Give every parameter below ``module`` its value, independent of how the model is cut."""
        for name, child in module.named_modules():
            full = f"{path}.{name}" if name else path
            own = dict(child.named_parameters(recurse=False))
            if not own:
                continue
            weights = self.adapter if is_adapter(full) else self.weights
            if weights is not None:
                for key, parameter in own.items():
                    part, shard = f"{full}.{key}", self.shards.get(f"{full}.{key}")
                    shape = tuple(parameter.shape) if shard is None else shard.shape
                    parameter.copy_(weights.read(part, shape, shard))
                continue
            whole = copy(child)
            whole._parameters = {
                key: self._whole(p, self.shards.get(f"{full}.{key}")) for key, p in child._parameters.items()
            }
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(full, self.seed))
                if is_adapter(full):
                    reset_adapter(full, whole)
                else:
                    self.skeleton._init_weights(whole)
            for key, parameter in own.items():
                if (shard := self.shards.get(f"{full}.{key}")) is not None:
                    parameter.copy_(shard.of(whole._parameters[key]))

    @staticmethod
    def _whole(parameter: nn.Parameter | None, shard: Shard | None) -> nn.Parameter | None:
        return parameter if shard is None else nn.Parameter(parameter.new_empty(shard.shape))

    def rotary(self, device: torch.device) -> nn.Module:
        """The model's rotary embedding; its buffers are computed, never stored."""
        return type(self.skeleton.base_model.rotary_emb)(config=self.config).to(device)
