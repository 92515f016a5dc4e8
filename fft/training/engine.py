"""DeepSpeed's pipeline engine, set up so that its arithmetic is that of one process.

What we know of it and rely on here is collected in docs/deepspeed.md.
"""

import contextlib
import io
import logging
import os
import socket
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from fft.arguments import TrainArguments
from fft.checkpoint import optimizer_state
from fft.data.batches import MicroBatch
from fft.errors import UserError
from fft.files import remove_file
from fft.models.causal_lm import StageBuilder
from fft.models.layers import DecoderLayer, canonical_parameters, held_tower, pipeline_layers
from fft.models.spec import ModelSpec
from fft.models.vision_layers import VisionBlock
from fft.ops import fused
from fft.ops.backends.choice import choose, kernel_name
from fft.ops.nf4 import check_nf4
from fft.parallel.mesh import MeshSizes
from fft.parallel.role import StageRole
from fft.parallel.tensor_plan import Shard
from fft.planning.layout import zero_stage
from fft.planning.objective import DPO
from fft.training.compiling import compile_alone
from fft.training.deepspeed_config import deepspeed_config
from fft.training.inputs import Sender, Sent
from fft.training.lean_deepspeed import deepspeed
from fft.training.loss import MeanLoss, PairMeanLoss, TokenMeanLoss
from fft.training.moe import announce_experts, count_experts_once, holders_of
from fft.training.optimizer import make_optimizer, parameter_groups
from fft.training.preference import Preference
from fft.training.schedule import lr_multiplier
from fft.training.shared_tower import SharedTower
from fft.training.staged import Exchanges, StagedModel, encode_before
from fft.training.sums import gradient_sums, sum_embeddings

#: Micro-batches of an evaluation whose images are encoded together, where a tower is shared.
_ENCODED = 8
#: Where a dynamic loss scale stands, by the names of DeepSpeed's loss scaler.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def init_distributed(here: int = 1) -> None:
    """Take this rank's device and join the launcher's process group; without a launcher, make a world of one.

    ``here`` is how many ranks this machine has. Collective.
    """
    alone = "RANK" not in os.environ
    if alone:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if on_host() and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one machine share its cores; left alone each would start a thread on every core.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's engine would, but kernels are compared and groups joined before there is one: all on the first device.
    device = int(os.environ["LOCAL_RANK"])
    deepspeed.get_accelerator().set_device(device)
    if on_host():
        _compile_operator()
    if alone:
        _join_nobody()
    with contextlib.redirect_stdout(io.StringIO()):  # a note that what was compiled is there
        deepspeed.init_distributed(verbose=False)
    # Every rank has its neighbours' buffers open. NCCL guesses the device by the rank's number, unless it is told.
    dist.barrier(device_ids=[device] if device_type() == "cuda" else None)
    _unlink_shared_buffer()


def _join_nobody() -> None:
    """Make the process group of a world of one, which nobody has to find: without a store that listens, which would do
    so for all networks, and with gloo's own sockets on loopback."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    backend = deepspeed.get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _compile_operator() -> None:
    """Have what DeepSpeed would compile for its all-reduce on CPUs as it joins the group, where it would."""
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        compile_alone(builder.name, builder.load)


def host_group() -> dist.ProcessGroup:
    """A group of all ranks that sends and reduces what is in host memory. Collective."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # every rank is in it


def _unlink_shared_buffer() -> None:
    """Take the name off this rank's all-reduce buffer, 66 MB in /dev/shm, which DeepSpeed on CPU never removes.

    The memory stays mapped while the ranks of this machine live, and goes with them, however they end.
    """
    job = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{os.environ['LOCAL_RANK']}"
    remove_file(Path("/dev/shm", f"deepspeed_allreduce_buffer_{job}"))


def check_kernels(spec: ModelSpec) -> str:
    """Compare the kernels that this rank will train with to their references; returns their names.

    Raises :class:`UserError` if they differ or do not fit the device.
    """
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    kernel = choose(device, spec.dtype, spec.attention, spec.attended_size, spec.caps_scores)
    names = [f"attention {kernel_name(kernel)}"]
    if spec.fused is not None:
        fused.check_operators(spec.fused, device, spec.dtype)
        names.append(f"fused operators {spec.fused.name}")
    if spec.packed:
        names.append(check_nf4(device, spec.dtype))
    if spec.compiler is not None:
        names.append(f"decoder layers by torch.compile ({spec.compiler})")
    return ", ".join(names)


def device_type() -> str:
    """The kind of device that DeepSpeed takes: "cpu", "cuda", "npu", ... (``DS_ACCELERATOR`` names another)."""
    return deepspeed.get_accelerator().device_name()


def on_host() -> bool:
    """Whether the device is the CPU."""
    return device_type() == "cpu"


def check_device(args: TrainArguments) -> None:
    """Ask DeepSpeed whether its accelerator has what the flags ask for. Raises :class:`UserError` where it does not."""
    accelerator = deepspeed.get_accelerator()
    if args.dtype == "fp16" and not accelerator.is_fp16_supported():
        raise UserError(
            f"--dtype fp16 does not run on this machine's device ({accelerator.device_name()}): use bf16 or fp32."
        )


class StageEngine:
    """The engine of this rank's stage: what a run asks of DeepSpeed's."""

    def __init__(
        self,
        engine: deepspeed.PipelineEngine,
        builder: StageBuilder,
        loss: MeanLoss,
        role: StageRole,
        shared: SharedTower | None = None,
    ) -> None:
        #: DeepSpeed's own, and the loss function that it was given.
        self.deepspeed, self.loss = engine, loss
        self.role, self.device = role, engine.device
        #: The tower that the ranks of a replica have together.
        self.shared = shared
        self._balance, self._sender = builder.balance, Sender(builder.under_way, engine.device, shared)
        builder.under_way.kept = role.mesh.pipe  # as many may be between their forward and their backward
        self._trained = 0
        #: Of the stage's layers, under their Hugging Face names.
        self.parameters = canonical_parameters(engine.module)
        self.optimizer = optimizer_state.StageOptimizer(
            getattr(engine.optimizer, "optimizer", engine.optimizer),  # ZeRO wraps it
            engine.lr_scheduler,
            bool(engine.zero_optimization_stage()),
            self.device,
        )

    def step(self, batches: Sequence[MicroBatch]) -> float:
        """Take an optimizer step; returns the mean loss over the trained tokens, or pairs, of the global batch.

        ``batches`` are this rank's micro-batches, of which a stage in the middle needs none. Collective.
        """
        engine = self.deepspeed
        if self.role.last:
            trained = torch.tensor(sum(b.trained for b in batches), dtype=torch.int64, device=self.device)
            dist.all_reduce(trained, group=engine.grid.get_data_parallel_group())
            axis, self._trained = engine.grid.get_data_parallel_world_size(), int(trained)
            self.loss.scale = axis * engine.micro_batches / max(1, self._trained)
        if self._balance is not None:
            self._balance.start(engine.micro_batches, self.loss_scale)
        loss = float(engine.train_batch(self._sender.send(batches)))
        engine.timers("train_batch").reset()  # which would keep two events of every step
        return loss

    def total_of(self, own: torch.Tensor) -> torch.Tensor:
        """The sum, on the device, over the ranks that count: of what ranks compute alike one does. Collective."""
        total = (own if self.role.counts else torch.zeros_like(own)).to(self.device)
        dist.all_reduce(total)
        return total

    def trained_nothing(self) -> bool:
        """Whether the last step had no token to train on, which the last stage knows. Collective."""
        trained = torch.tensor(self._trained, dtype=torch.int64, device=self.device)
        dist.all_reduce(trained, dist.ReduceOp.MAX)
        return not int(trained)

    def sum_losses(self, batches: Iterable[MicroBatch], micro_batches: int) -> float:
        """Sum of the losses of so many micro-batches' tokens, or pairs, on ranks of the last stage. Collective."""
        self.loss.scale = 1.0
        if self.shared is None:
            return self._evaluate(self._sender.send(batches), micro_batches)
        total, iterator = 0.0, iter(batches)
        for first in range(0, micro_batches, _ENCODED):
            count = min(_ENCODED, micro_batches - first)
            with torch.no_grad():
                inputs = self._sender.send([*islice(iterator, count)])
            total += self._evaluate(inputs, count)
        return total

    def _evaluate(self, inputs: Iterator[Sent], micro_batches: int) -> float:
        losses = self.deepspeed.eval_batch(
            inputs, reduce_output=None, bcast_loss=False, num_micro_batches=micro_batches
        )
        return float(sum(losses)) if self.role.last else 0.0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.deepspeed.get_lr()[0]

    @property
    def grad_norm(self) -> float:
        """Of the whole model in the last step, before clipping; NaN before the first."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by until the optimizer divides them by it: not 1 in fp16 alone."""
        return float(self.deepspeed.optimizer.loss_scale) if self.deepspeed.fp16_enabled() else 1.0

    @property
    def skipped(self) -> int:
        """Steps so far that changed nothing, since their gradients were not finite. The schedule waits for them."""
        return self.deepspeed.skipped_steps

    @property
    def scaling(self) -> dict[str, float]:
        """The steps that were skipped and, of fp16, the loss scale."""
        scale = {"loss_scale": self.loss_scale} if self.deepspeed.fp16_enabled() else {}
        return scale | {"skipped_steps": self.skipped}

    def scaler_state(self) -> dict:
        """How many steps were skipped and, in fp16, where the dynamic loss scale stands."""
        names = _SCALER if self.deepspeed.fp16_enabled() else ()
        scaler = self.deepspeed.optimizer.loss_scaler if names else None
        return {"skipped": self.skipped} | {name: getattr(scaler, name) for name in names}

    def restore(self, training: Path, shards: Mapping[str, Shard], step: int, scaler: dict | None) -> None:
        """Stand where a run stood after ``step`` steps, whose ranks wrote their states to ``training``.

        ``shards`` are the parts of parameters that this rank holds; ``scaler`` is what :meth:`scaler_state` gave.
        """
        engine, skipped = self.deepspeed, 0
        if scaler is not None:
            for name in _SCALER if engine.fp16_enabled() else ():
                setattr(engine.optimizer.loss_scaler, name, scaler[name])
            skipped = engine.skipped_steps = scaler["skipped"]
        engine.global_steps = step
        # Steps that were skipped moved neither schedule nor optimizer.
        optimizer_state.restore(self.optimizer, self.parameters, shards, training, step - skipped)


def build_engine(
    args: TrainArguments, builder: StageBuilder, mesh: MeshSizes, bounds: list[int], total_steps: int
) -> StageEngine:
    """Build this rank's stage, optimizer, schedule and engine. Collective."""
    role = StageRole.of(mesh, dist.get_rank())
    loss = PairMeanLoss(builder, Preference.of(args)) if args.objective == DPO else TokenMeanLoss(builder)
    shared, spec = None, builder.spec
    if spec.images is not None and spec.shared_tower:
        width = spec.tower_width
        shared = SharedTower(role, spec.images.merge, width, again=args.checkpoint_grad_interval > 0)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its own notes to stdout
        module = StagedModel(
            pipeline_layers(builder, args.split_dlayer),
            bounds,
            mesh,
            packs := builder.spec.images is not None,
            held_tower(builder),
            loss_fn=loss,
            activation_checkpoint_interval=args.checkpoint_grad_interval,
            checkpointable_layers=[DecoderLayer.__name__, VisionBlock.__name__],
            dynamic_shape=args.ragged or packs,
        )
    stage, device = zero_stage(args, mesh), "cpu" if args.offload_optimizer else device_type()
    mark = announce_experts(module, builder)
    holders = holders_of(module, role, builder.ranks.expert if mark else None)
    groups = parameter_groups(module, args.weight_decay, mark)
    optimizer = make_optimizer(args, groups, device, None if stage else holders)
    floor = args.min_learning_rate / args.learning_rate if args.learning_rate else 0.0
    multiplier = lr_multiplier(args.lr_scheduler_type, args.warmup_steps, max(1, total_steps), floor, args.decay_ratio)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier),
            config=deepspeed_config(args, stage),
        )
    if engine.using_bf16_optimizer:
        outer = weakref.proxy(engine.optimizer)  # it holds ours
        optimizer.norm = lambda: torch.as_tensor(outer._global_grad_norm)  # with experts it is a number
    if (sums := gradient_sums(engine)) is not None:
        loss.sum_into(sums, engine.micro_batches)
        sum_embeddings(module, sums)
    if mark and engine.using_bf16_optimizer:
        count_experts_once(engine.optimizer, holders)
    replicas = mesh.data * mesh.sequence
    if replicas == 1 and (engine.using_bf16_optimizer or not stage):
        engine.pipeline_enable_backward_allreduce = False  # it would copy all gradients, to reduce them over one rank
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the trainer counts skipped steps, in any type
    if mesh.pipe > 1:
        Exchanges(engine)  # which the engine holds
    if shared is not None and module.tower is not None:
        shared.hold(module.tower)
        encode_before(engine, shared)
    return StageEngine(engine, builder, loss, role, shared)
