"""Any Hugging Face decoder, built from transformers' own modules: the part of it that one rank computes.

The model is laid out once on the meta device (:class:`~fft.models.spec.ModelSpec`); each rank then materialises only
the modules of its stage and fills them parameter by parameter, from files or from a seed.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fft.errors import UserError
from fft.models.directory import check_adapter, check_tensors
from fft.models.experts import LoadBalance
from fft.models.four_bits import FrozenLinear
from fft.models.lora import MAGNITUDE, LoraLinear, hold_columns, is_adapter, reset_adapter, row_lengths, seed_of
from fft.models.rotary import Turns
from fft.models.spec import ModelSpec, copy_of, cut
from fft.ops.cross_entropy import Vocabulary
from fft.ops.documents import Documents, UnderWay
from fft.ops.experts import spread_all
from fft.ops.nf4 import rounded
from fft.ops.sequence_parallel import SequenceParallel, ShardedDocuments
from fft.parallel.expert import ExpertParallel
from fft.parallel.mesh import MeshSizes
from fft.parallel.tensor import TensorParallel, parallelise
from fft.parallel.tensor_plan import Shard, heads_of
from fft.weights.hf import WeightReader, is_finite

#: Documents of a micro-batch, positions in them [1, tokens], and cosines and sines for each type of layer.
Known = tuple[Documents | ShardedDocuments, Tensor, dict[str | None, Turns | None]]

#: So marked, transformers leaves a parameter alone when it initialises a module.
_LOADED = "_is_hf_initialized"


@dataclass(frozen=True)
class Ranks:
    """With whom this rank shares the parameters of its layers, the tokens of a row, experts; None: it has all."""

    tensor: TensorParallel | None = None
    sequence: SequenceParallel | None = None
    expert: ExpertParallel | None = None

    @classmethod
    def join(cls, spec: ModelSpec, mesh: MeshSizes, ulysses_degree: int = 1) -> "Ranks":
        """This rank's place in ``mesh``. Collective: every rank of the default group calls it."""
        tensor = TensorParallel(mesh, heads_of(spec.text)[1]) if mesh.tensor > 1 else None
        sequence = SequenceParallel(mesh.sequence_groups(), ulysses_degree) if mesh.sequence > 1 else None
        return cls(tensor, sequence, ExpertParallel(mesh) if mesh.expert > 1 else None)

    @property
    def places(self) -> tuple[int, int, tuple[int, int]]:
        """What :meth:`ModelSpec.shards` takes: rank and size of the tensor ranks, and those of the expert ranks."""
        tensor, expert = self.tensor, self.expert
        rank, size = (0, 1) if tensor is None else (tensor.rank, tensor.size)
        return rank, size, (0, 1) if expert is None else (expert.rank, expert.size)


class StageBuilder:
    """Builds modules of a model as this rank has them: cut for tensor parallelism, filled from ``weights``.

    Without ``weights`` parameters have the values of ``spec.seed``. Those of adapters are read from ``adapter``, a
    reader of its own, or have the seed's. What is built has the same values however the model is cut. Raises
    :class:`UserError` where files lack tensors of the model, or hold others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ranks: Ranks | None = None,
        weights: WeightReader | None = None,
        adapter: WeightReader | None = None,
    ) -> None:
        if weights is not None:
            check_tensors(spec, weights.names, weights.directory)
        if adapter is not None:
            check_adapter(spec, adapter.names, adapter.directory)
        self.spec, self.ranks = spec, ranks or Ranks()
        self._weights, self._adapter = weights, adapter
        sequence = self.ranks.sequence
        #: Parts of parameters that this rank holds where it holds the layer, by full name; what is not here is whole.
        self.shards: Mapping[str, Shard] = spec.shards(*self.ranks.places)
        #: Of a mixture of experts: the balance losses of the layers that are built.
        self.balance: LoadBalance | None = None
        if spec.routing is not None:
            self.balance = LoadBalance(spec.routing, None if sequence is None else sequence.group)
        #: Of the micro-batches that its layers are computing.
        self.under_way: UnderWay[Known] = UnderWay()

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that hold a stage together."""
        rank, _, (place, _) = self.ranks.places
        return rank == place == 0

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the loss: how logits are made, and which of them are this rank's."""
        return Vocabulary(self.shards.get(self.spec.head), self.ranks.tensor, self.spec.outside.cap)

    def build(self, path: str, module: nn.Module | None = None) -> nn.Module:
        """Materialise the module at ``path`` (a dotted name within the model), this rank's part of it, on the CPU.

        ``module``, on the meta device, stands for the one at ``path`` where only some of its children are wanted.
        Raises :class:`UserError` where files lack its parameters or buffers, and where nothing gives a buffer a value.
        """
        built = copy_of(module or self.spec.skeleton.get_submodule(path))
        shards = cut(built, path, self.shards)
        built.to_empty(device="cpu")
        self._fill(built, path)
        if self.ranks.tensor is not None:
            parallelise(built, self.spec.within(path), self.spec.plan, shards, self.ranks.tensor)
            hold_columns(built, shards, self.ranks.tensor)
        if self.ranks.expert is not None:
            spread_all(built, self.ranks.expert)
        return built

    @torch.no_grad()
    def _fill(self, module: nn.Module, path: str) -> None:
        """Give every parameter and buffer below ``module`` its value."""
        for name, child in [*module.named_modules()]:  # what is packed is a module more
            full = f"{path}.{name}" if name else path
            own, buffers = dict(child.named_parameters(recurse=False)), dict(child.named_buffers(recurse=False))
            if not own and not buffers:
                continue
            lengths = own.pop(MAGNITUDE, None)
            versions = {key: buffer._version for key, buffer in buffers.items()}
            weights = self._adapter if is_adapter(full) else self._weights
            if weights is None:
                self._seed(child, full)
            elif buffers:
                self._compute_buffers(child)
            if weights is not None:
                self._read(weights, full, {**own, **_persistent(child)})
            for key, buffer in child.named_buffers(recurse=False):
                if buffer is buffers[key] and buffer._version == versions[key]:  # nobody has written into it
                    raise UserError(
                        f"{full}.{key} is a buffer of model type {self.spec.config.model_type!r} to which transformers "
                        "gives no first value: start from weights, without --init."
                    )
            if isinstance(child, FrozenLinear) and child.packs:
                child.pack()  # one after the other, so that the next one's memory is all that is needed besides
            if lengths is not None and isinstance(child, LoraLinear):
                self._fill_lengths(child, full, lengths)

    def _fill_lengths(self, module: LoraLinear, path: str, lengths: Tensor) -> None:
        """Give DoRA's ``lengths`` the adapter's values or, at a run's start, those that the rows of W have."""
        name = f"{path}.weight"
        shard, pieces = self.shards.get(name), self.spec.stored.pieces(name)
        if self._adapter is not None:
            self._read(self._adapter, path, {MAGNITUDE: lengths})
        elif shard is None or shard.dim == 0:
            lengths.copy_(row_lengths(module.whole()))
        else:  # of rows of which this rank has a part
            if self._weights is not None:
                whole = self._weights.read(name, shard.shape, None, pieces).to(lengths.dtype)
            else:
                whole = self._seeded(module, path).get_parameter("weight")
            lengths.copy_(row_lengths(rounded(whole) if module.packs else whole))

    def _read(self, weights: WeightReader, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Give own tensors of the module at ``path``, by name, the values that files have."""
        for key, tensor in tensors.items():
            name = f"{path}.{key}"
            shard, pieces = self.shards.get(name), self.spec.stored.pieces(name)
            shape = tuple(tensor.shape) if shard is None else shard.shape
            tensor.copy_(weights.read(name, shape, shard, pieces))
            if tensor.dtype == torch.float16 and not is_finite(tensor):  # it was when it was read
                raise UserError(f"{path}.{key} has values that fp16 cannot hold: use --dtype bf16 or fp32.")

    def _compute_buffers(self, module: nn.Module) -> None:
        """Give the own buffers of ``module`` the values that transformers computes when it loads a model."""
        parameters = list(module.parameters(recurse=False))
        with torch.random.fork_rng(devices=[]):
            for parameter in parameters:
                setattr(parameter, _LOADED, True)
            self.spec.skeleton._init_weights(module)
            for parameter in parameters:
                delattr(parameter, _LOADED)

    def _seed(self, module: nn.Module, path: str) -> None:
        """Give the own parameters and buffers of ``module`` the values that the seed has for its name."""
        whole = self._seeded(module, path)
        for key, parameter in module.named_parameters(recurse=False):
            if (shard := self.shards.get(f"{path}.{key}")) is not None and key != MAGNITUDE:
                parameter.copy_(shard.of(whole.get_parameter(key)))

    def _seeded(self, module: nn.Module, path: str) -> nn.Module:
        """``module`` with whole parameters, of which it has parts, and the values that the seed has for its name."""
        whole = copy.copy(module)
        whole._parameters = {
            key: _whole(parameter, self.shards.get(f"{path}.{key}"))
            for key, parameter in module._parameters.items()
            if key != MAGNITUDE
        }
        own = dict(whole.named_parameters(recurse=False))
        before = {key: parameter._version for key, parameter in own.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(path, self.spec.seed))
            if is_adapter(path) and isinstance(whole, nn.Linear):
                reset_adapter(path, whole)
            else:
                self.spec.skeleton._init_weights(whole)
            if any(parameter._version == before[key] for key, parameter in own.items()):
                self._seed_by_parent(whole, path, [own[key] for key in own if own[key]._version > before[key]])
        for key, parameter in own.items():
            if parameter._version == before[key]:
                raise UserError(
                    f"{path}.{key} is a parameter of model type {self.spec.config.model_type!r} to which transformers "
                    "gives no first value: start from weights, without --init."
                )
        return whole

    def _seed_by_parent(self, module: nn.Module, path: str, done: Sequence[nn.Parameter]) -> None:
        """Have the parent of ``module`` give it first values, as some routers get them; ``done`` has its own."""
        above, _, name = path.rpartition(".")
        parent = copy.copy(self.spec.skeleton.get_submodule(above))  # all but the child is on the meta device
        parent._modules = {**parent._modules, name: module}
        for parameter in done:
            setattr(parameter, _LOADED, True)
        self.spec.skeleton._init_weights(parent)
        for parameter in done:
            delattr(parameter, _LOADED)


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Own buffers of a module that are stored with its parameters."""
    kept = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in kept}


def _whole(parameter: nn.Parameter | None, shard: Shard | None) -> nn.Parameter | None:
    return parameter if parameter is None or shard is None else nn.Parameter(parameter.new_empty(shard.shape))
