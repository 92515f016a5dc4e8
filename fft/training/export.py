"""What a run writes of its model: each stage its own shards, and what makes a Hugging Face directory of them."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fft.arguments import TrainArguments
from fft.checkpoint import model_folder
from fft.checkpoint.adapter import adapter_config, adapter_parameters, write_adapter
from fft.checkpoint.card import CARD, card_of
from fft.checkpoint.finite import not_finite_anywhere
from fft.checkpoint.gather_weights import whole_tensors
from fft.checkpoint.run import RunFolder
from fft.checkpoint.saver import Contents
from fft.errors import UserError
from fft.files import write_atomically
from fft.models.causal_lm import StageBuilder
from fft.models.layers import canonical_buffers
from fft.models.lora import adapted
from fft.models.vision import vision_parts
from fft.planning.preflight import Plan
from fft.training.engine import StageEngine
from fft.weights import hf


class ModelExport:
    """The weights of a run as this rank writes them: the model, or with ``--lora_dim`` the adapters alone.

    ``control`` is a group of all ranks that sends what is in host memory.
    """

    def __init__(self, plan: Plan, builder: StageBuilder, engine: StageEngine, control: dist.ProcessGroup) -> None:
        self._plan, self._builder, self._engine, self._control = plan, builder, engine, control
        self._config = copy.deepcopy(plan.config)
        self._config.dtype = builder.spec.dtype
        self._config.architectures = [type(builder.spec.skeleton).__name__]
        self._base = plan.weights.directory if plan.weights else None
        #: Content of ``adapter_config.json``; None where the model itself is trained.
        self._adapter: dict | None = None
        if builder.spec.lora is not None and self._base is not None:
            skeleton = builder.spec.skeleton
            targets = adapted(skeleton) if vision_parts(skeleton) else None  # whose layers are called as a decoder's
            self._adapter = adapter_config(builder.spec.lora, self._base, targets)

    @cached_property
    def _apart(self) -> dict[str, Tensor]:
        """What no layer of a pipeline holds, on the one rank that writes it, in its host's memory: the checkpoint that
        it is read from may be gone when the next one is written.
        """
        if not (self._engine.role.first and self._builder.leads) or self._adapter is not None:
            return {}
        built = {path: self._builder.build(path) for path in self._builder.spec.apart}
        tensors = {f"{path}.{name}": t for path, module in built.items() for name, t in module.state_dict().items()}
        return self._builder.spec.stored.to_stored(tensors)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that this stage writes: the last stage's copy of a tied embedding is the first stage's tensor."""
        held = self._engine.parameters if self._adapter is None else adapter_parameters(self._engine.parameters)
        if self._engine.role.first:
            return held
        spec = self._builder.spec  # a tower that this stage holds with others is the first's to write, too
        shared = tuple(f"{path}." for path in (vision_parts(spec.skeleton) if spec.shared_tower else ()))
        elsewhere = (*shared, *((spec.head,) if spec.tied else ()))
        return {name: p for name, p in held.items() if not name.startswith(elsewhere)}

    def weights(self) -> tuple[dict[str, Tensor], int] | None:
        """The tensors that this rank writes, and the number of its shard; None where another replica writes them.

        Collective over the ranks that hold a stage together.
        """
        role = self._engine.role
        if not role.writes:
            return None
        buffers = {} if self._adapter is not None else canonical_buffers(self._engine.deepspeed.module)
        return {**whole_tensors({**self.parameters, **buffers}, self._builder), **self._apart}, role.shard

    def fault(self, step: int, training: Mapping[str, Tensor] = MappingProxyType({})) -> str | None:
        """Why what a run has after ``step`` is not to be written: values that are no numbers, in what is trained, or
        in this rank's ``training`` state. What a model came with, and is not trained, is as it was. Collective.
        """
        written = self.parameters if self._engine.role.writes else {}
        trained = {name: p for name, p in written.items() if p.requires_grad}
        fault = not_finite_anywhere({**trained, **training}, self._control)
        return fault and (
            f"step {step}: {fault}; it is not written, what was saved before is as it was: lower --learning_rate or "
            "look at the data, and go on from an earlier checkpoint (--resume step-N), or begin again."
        )

    def contents(self, args: TrainArguments, run: RunFolder) -> Contents:
        """What goes into the checkpoints in the folder ``run`` besides tensors."""
        return Contents(
            run,
            self._config,
            self._plan.tokenizer,
            self._base,
            self._engine.role.shards,
            newest=args.max_num_checkpoints,
            best=args.best_of,
            adapter=self._adapter,
            four_bits=self._builder.spec.four_bits,
            rules=self._plan.images,
        )

    def save_model(self, output: str, state: Mapping[str, Any]) -> None:
        """Write a model or adapter directory: every stage its own shards, in parallel; replaces what stands there.

        ``state``, that of a checkpoint, is what its card says.

        Waits while another process writes there. Collective. Raises :class:`UserError` where it cannot be written,
        and for a model with values that are no numbers.
        """
        if (fault := self.fault(state["step"])) is not None:
            raise UserError(fault)
        with ExitStack() as held:
            if dist.get_rank() == 0:
                held.enter_context(model_folder.replaced(output))
            dist.barrier()
            if (weights := self.weights()) is not None:
                model_folder.write_model_shard(output, *weights, self._engine.role.shards)
            dist.barrier()
            if dist.get_rank() == 0:
                model_folder.finish(output, partial(self._complete, state))
        dist.barrier()

    def _complete(self, state: Mapping[str, Any], staging: Path) -> list[str]:
        """Add to the shards of all ranks what makes a directory of them; returns the names of the files."""
        shards, plan = self._engine.role.shards, self._plan
        if self._adapter is not None:
            names = write_adapter(staging, shards, self._adapter, self._builder.spec.four_bits)
        else:
            names = hf.write_metadata(staging, self._config, plan.tokenizer, shards, self._base, plan.images)
        write_atomically(staging / CARD, card_of(state, self._config.model_type))
        return [*names, CARD]
