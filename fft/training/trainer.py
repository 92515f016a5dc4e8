"""A training run: plan, build or resume, step, evaluate, save, write a Hugging Face model."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from fft.arguments import TrainArguments
from fft.checkpoint import folder, optimizer_state
from fft.checkpoint.adapter import AdapterReader, adapter_config, adapter_parameters, write_adapter
from fft.checkpoint.gather_weights import whole_tensors
from fft.checkpoint.saver import Contents, Part, Saver
from fft.data.batches import BatchPlan, Loader, MicroBatch, step_batches
from fft.data.table import IGNORE
from fft.errors import UserError
from fft.files import replace_folder, staging_folder, start_folder
from fft.models.causal_lm import Ranks, StageBuilder
from fft.models.layers import canonical_parameters
from fft.models.lora import trained
from fft.models.spec import DTYPES, ModelSpec
from fft.ops.documents import Documents
from fft.planning.costs import layer_costs
from fft.planning.layout import describe, plan_layout
from fft.planning.partition import pipeline_bubble
from fft.planning.preflight import Plan, batch_plan, plan_run
from fft.training import run_folder
from fft.training.early_stop import EarlyStop
from fft.training.engine import (
    build_engine,
    check_device,
    check_kernels,
    init_distributed,
    model_spec,
    on_host,
)
from fft.training.environment import environment
from fft.training.metric_sinks import Sinks, open_sinks
from fft.training.metrics import (
    Metrics,
    Stopwatch,
    flops_per_token,
    loss_scale,
    matrix_rate,
    mean_balance,
    over_ranks,
    scaling,
)
from fft.training.run_folder import Start
from fft.weights import hf

#: What gloo says when another process is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")

#: Exit code of a run that was asked to stop and saved first: EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STOPPED = 75


def run(args: TrainArguments) -> int:
    """Run to the end; returns the exit code."""
    world = _world_size()
    check_device(args)
    plan = plan_run(args, world)
    spec = model_spec(args, plan.config)
    layout = plan_layout(args, spec, plan.mesh, on_host())
    init_distributed()
    try:
        _log("\n".join([describe(args, plan.config.model_type, layout), *_data(args, plan)]))
        _log(f"kernels: {check_kernels(spec)}")
        if args.lora_dim or args.freeze:
            _log(f"{trained(spec.skeleton.parameters()):,} parameters are trained, the others are frozen")
        with contextlib.ExitStack() as held:
            control = dist.new_group(backend="gloo")
            start = run_folder.enter(args, plan, control, held, _log) if args.checkpoint else Start()
            builder = StageBuilder(spec, Ranks.join(spec, plan.mesh, args.ulysses_degree), *_weights(plan, spec, start))
            trainer = Trainer(args, plan, builder, layout.bounds, control, start, held)
            code = trainer.train()
            if code == 0 and args.output_dir:
                trainer.save_model(args.output_dir)
                _log(f"model written to {args.output_dir}")
        dist.barrier()
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST_PEER):
            raise
        # Whoever ended first has said why; a stack of its neighbours' tracebacks would bury that.
        raise UserError(
            f"rank {_rank()} lost the connection to a rank that ended before it: see what that said."
        ) from error
    # Not after an error: the others would see a closed connection before they see this rank's message.
    dist.destroy_process_group()
    return code


class Trainer:
    """The loop around DeepSpeed's pipeline engine."""

    def __init__(
        self,
        args: TrainArguments,
        plan: Plan,
        builder: StageBuilder,
        bounds: list[int],
        control: dist.ProcessGroup,
        start: Start,
        held: contextlib.ExitStack,
    ) -> None:
        self.args, self.plan, self.builder, self.start = args, plan, builder, start
        self.engine, self.loss = build_engine(args, builder, plan.mesh, bounds, plan.total_steps)
        if start.checkpoint is not None:
            self._restore(start.checkpoint / folder.TRAINING)
        facts = environment(control) if args.checkpoint else {}
        if _rank() == 0 and args.checkpoint:  # not before: weights that do not fit must not cost an older run
            run_folder.create(args, plan, start, facts)
        self.metrics = self._metrics(held)
        self.early_stop = EarlyStop.from_state(args.early_stop_patience, start.state.get("early_stop"))
        self.saver = Saver(self._contents(), args.background_executor, control) if args.checkpoint else None
        #: Where every rank has a share of a row's tokens; None where it has whole rows.
        self.parallel = builder.ranks.sequence
        replica = self.engine.grid.get_data_parallel_id() // plan.mesh.sequence
        self.batches: BatchPlan = batch_plan(args, plan.mesh, replica)
        #: Only the first stage reads ids and only the last reads labels; the others open nothing.
        first, last = self.engine.is_first_stage(), self.engine.is_last_stage()
        self.reads = first or last
        #: Of the ranks that compute with the same tokens, one counts them.
        self.counts = last and self.engine.grid.get_slice_parallel_rank() == 0
        self.training, self.evaluation = (
            reader and reader.for_stage(ids=first, labels=last) for reader in (plan.train, plan.evaluation)
        )
        self.loader = (
            Loader(self.training, self.batches, plan.total_samples) if self.reads and plan.total_steps else None
        )
        if self.loader is not None and start.checkpoint is not None:
            self.loader.load_state_dict(start.state["data"])

    def train(self) -> int:
        """Take every step of the plan, evaluating and checkpointing along the way; returns the exit code."""
        args, plan, metrics = self.args, self.plan, self.metrics
        if self.start.state.get("eval_loss") is None and (not self.start.step or self._evaluates(self.start.step)):
            self.evaluate(self.start.step)
        asked = _asked_to_stop() if self.saver is not None and not args.only_ckpt_model else []
        stop, step = False, self.start.step
        steps = () if self.early_stop.over else self._steps()
        watch = Stopwatch(self.start.step)
        for step, (batches, wait) in enumerate(steps, start=self.start.step + 1):
            watch.waited(wait)
            watch.computed(sum(len(batch.labels) for batch in batches) if self.counts else 0)
            lr = self._learning_rate()
            loss = float(self._step(batches))
            if not np.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {step}: lower --learning_rate or look at the data.")
            values = {"loss": loss, "lr": lr, "grad_norm": self._grad_norm()}
            values |= mean_balance(self.builder.balance, self.engine.device) | scaling(self.engine)
            if step % args.logging_steps == 0 or step == plan.total_steps:
                metrics.report(step, values, watch.lap(step, plan.total_steps))
            else:
                metrics.record(step, **values)
            with watch.paused():
                stop = self.saver is not None and self.saver.step(bool(asked)) and step < plan.total_steps
                saves = bool(args.save_steps) and step % args.save_steps == 0
                evaluates = not stop and (self._evaluates(step) or (saves and args.best_of > 0))
                eval_loss = self.evaluate(step) if evaluates else None
                if saves or stop:
                    self.save_checkpoint(step, eval_loss)
            if stop or self.early_stop.over:
                break
        if self.saver is not None:
            self.saver.close()
        if not stop:
            if self.early_stop.over:
                _log(
                    f"stopped early after step {step}/{plan.total_steps}: {self.early_stop.stalled} evaluations "
                    f"brought no lower validation loss than {self.early_stop.best:.4f}"
                )
            return 0
        _log(
            f"stopped by the signal {signal.Signals(asked[0]).name if asked else 'of another rank'} after step "
            f"{step}/{plan.total_steps}: saved; the same command with --resume auto goes on from there"
        )
        return EXIT_STOPPED

    def evaluate(self, step: int) -> float | None:
        """Mean loss over every predicted token of ``--eval_data``, the same on all ranks; None without a table."""
        reader = self.evaluation
        if reader is None:
            return None
        samples = reader.samples_per_epoch
        per_step = self.batches.replicas * self.batches.micro_batch_size
        micro_batches = -(-samples // per_step)
        plan = dataclasses.replace(self.batches, micro_batches=1)
        trained = 0

        def batches() -> Iterator[MicroBatch]:
            nonlocal trained
            for i in range(micro_batches):
                batch = self._own(step_batches(reader, plan, i * plan.global_batch, samples)[0])
                trained += batch.trained
                yield batch

        self.loss.scale = 1.0
        sums = self.engine.eval_batch(
            map(_to_torch, batches()) if self.reads else iter(()),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=micro_batches,
        )
        totals = torch.tensor([float(sum(sums)), float(trained)] if self.counts else [0.0, 0.0], dtype=torch.float64)
        totals = totals.to(self.engine.device)
        dist.all_reduce(totals)
        if not totals[1]:
            raise UserError(
                f"--eval_data {self.args.eval_data} holds nothing to predict: give documents of 2 tokens or more."
            )
        loss = float(totals[0] / totals[1])
        self.early_stop.see(loss)
        self.metrics.record(step, eval_loss=loss, eval_tokens=int(totals[1]))
        _log(f"step {step}/{self.plan.total_steps}  validation loss {loss:.4f} over {int(totals[1]):,} tokens")
        return loss

    def save_model(self, output: str) -> None:
        """Write a model or adapter directory: every stage its own shards, in parallel; replaces what stands there."""
        staging, shards = staging_folder(output), self._shards
        if _rank() == 0:
            start_folder(output)
        dist.barrier()
        if self.engine.grid.get_data_parallel_id() == 0:
            hf.write_shard(staging, whole_tensors(self._own_parameters(), self.builder), self._shard, shards)
        dist.barrier()
        if _rank() == 0:
            if self.builder.spec.lora is not None:
                write_adapter(staging, shards, self._adapter())
            else:
                hf.write_metadata(staging, self._config(), self.plan.tokenizer, shards, self._model())
            replace_folder(output)
        dist.barrier()

    def save_checkpoint(self, step: int, eval_loss: float | None) -> None:
        """Begin to write the model after ``step``, and what a run needs to go on from it, into the run folder."""
        begun, tag = time.perf_counter(), folder.checkpoint_tag(step)
        parameters = self._own_parameters()
        first = self.engine.grid.get_data_parallel_id() == 0
        part = Part(
            (whole_tensors(parameters, self.builder), self._shard) if first else None,
            None if self.args.only_ckpt_model else optimizer_state.gather(self.engine, parameters, self.builder.shards),
        )
        data = self.loader.state_dict() if self.loader else None
        facts = run_folder.state_of(self.args, self.plan, step, data, eval_loss, self.early_stop)
        self.saver.save(tag, part, facts | {"loss_scaler": optimizer_state.loss_scaler(self.engine)})
        self.metrics.record(step, save_seconds=time.perf_counter() - begun)
        _log(f"step {step}/{self.plan.total_steps}  checkpoint {Path(self.args.checkpoint) / tag}")

    def _restore(self, training: Path) -> None:
        parameters = canonical_parameters(self.engine.module)
        optimizer_state.restore(self.engine, parameters, self.builder.shards, training, self.start.step)
        optimizer_state.restore_loss_scaler(self.engine, self.start.state.get("loss_scaler"))
        if self.start.state["layout"] == dataclasses.asdict(self.plan.mesh):
            optimizer_state.restore_random(training, _rank())

    def _own_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that this stage writes: the last stage's copy of a tied embedding is the first stage's tensor."""
        parameters = canonical_parameters(self.engine.module)
        if self.builder.spec.lora is not None:
            return adapter_parameters(parameters)
        if self.plan.config.get_text_config().tie_word_embeddings and not self.engine.is_first_stage():
            return {name: p for name, p in parameters.items() if "embed_tokens" not in name}
        return parameters

    def _config(self) -> PretrainedConfig:
        self.plan.config.dtype = DTYPES[self.args.dtype]
        return self.plan.config

    def _model(self) -> Path | None:
        return self.plan.weights.directory if self.plan.weights else None

    def _adapter(self) -> dict | None:
        """Content of ``adapter_config.json``; None where the model itself is trained."""
        return self.builder.spec.lora and adapter_config(self.builder.spec.lora, self.plan.weights.directory)

    def _contents(self) -> Contents:
        args = self.args
        kept = {"newest": args.max_num_checkpoints, "best": args.best_of, "adapter": self._adapter()}
        return Contents(Path(args.checkpoint), self._config(), self.plan.tokenizer, self._model(), self._shards, **kept)

    @property
    def _shards(self) -> int:
        """Weight files of a model: one for each stage and tensor-parallel rank."""
        return self.plan.mesh.pipe * self.plan.mesh.tensor

    @property
    def _shard(self) -> int:
        """The one of them that this rank writes."""
        return self.engine.stage_id * self.plan.mesh.tensor + self.engine.grid.get_slice_parallel_rank()

    def _evaluates(self, step: int) -> bool:
        every = self.args.eval_steps
        return step == self.plan.total_steps or (every > 0 and step % every == 0)

    def _steps(self) -> Iterator[tuple[list[MicroBatch], float]]:
        """Micro-batches of every step, and the seconds this rank waited for them."""
        if self.loader is None:
            yield from (([], 0.0) for _ in range(self.start.step, self.plan.total_steps))
            return
        waited = 0.0
        for batches in self.loader:
            yield [self._own(batch) for batch in batches], self.loader.waited - waited
            waited = self.loader.waited

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """This rank's share of a micro-batch: its tokens, and labels that were shifted before; all boundaries."""
        if self.parallel is None:
            return batch
        documents = Documents.from_padded(torch.from_numpy(batch.cu_seqlens))
        own = self.parallel.tokens(self.parallel.shards(documents.bounds))
        labels = batch.labels[own]
        return MicroBatch(batch.input_ids[:, own], labels, batch.cu_seqlens, int(np.count_nonzero(labels != IGNORE)))

    def _step(self, batches: list[MicroBatch]) -> torch.Tensor:
        """One optimizer step; returns the mean loss over the trained tokens of the global batch."""
        if self.engine.is_last_stage():
            trained = torch.tensor(sum(b.trained for b in batches), dtype=torch.int64, device=self.engine.device)
            dist.all_reduce(trained, group=self.engine.grid.get_data_parallel_group())
            axis = self.engine.grid.get_data_parallel_world_size()
            self.loss.scale = axis * self.batches.micro_batches / max(1, int(trained))
        if self.builder.balance is not None:
            self.builder.balance.start(self.batches.micro_batches, loss_scale(self.engine))
        return self.engine.train_batch(map(_to_torch, batches))

    def _metrics(self, held: contextlib.ExitStack) -> Metrics:
        """Where numbers go, and what speed is measured against, which is told at once."""
        args, plan, device, sinks = self.args, self.plan, self.engine.device, Sinks(_log)
        if _rank() == 0:
            run = Path(args.checkpoint) if args.checkpoint else None
            sinks = held.enter_context(open_sinks(run, self.start.step, dataclasses.asdict(args), _log))
        flops = flops_per_token([cost.flops for cost in layer_costs(self.builder.spec, args.seq_len)])
        rate = matrix_rate(DTYPES[args.dtype], device) if plan.total_steps else float("nan")
        peak = over_ranks(rate, dist.ReduceOp.SUM, device)
        metrics = Metrics(sinks, _log, plan.total_steps, flops, peak, device)
        if plan.total_steps:
            bubble = pipeline_bubble(plan.mesh.pipe, args.gradient_accumulation_steps)
            metrics.record(self.start.step, matrix_flops_per_second=peak, pipeline_bubble=bubble)
            _log(
                f"{flops:.3g} FLOPs a token; matrix products of {args.dtype} reach {peak / plan.mesh.world / 1e12:.3g} "
                f"TFLOP/s a device; pipeline bubble {bubble:.1%}"
            )
        return metrics

    def _learning_rate(self) -> float:
        """The rate the next step will use."""
        return self.engine.get_lr()[0]

    def _grad_norm(self) -> float:
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")


def _weights(plan: Plan, spec: ModelSpec, start: Start) -> tuple[hf.WeightReader | None, hf.WeightReader | None]:
    """What the model and its adapters are read from."""
    if start.checkpoint is None:
        return plan.weights, None
    return (
        (hf.WeightReader(start.checkpoint), None)
        if spec.lora is None
        else (plan.weights, AdapterReader(start.checkpoint))
    )


def _asked_to_stop() -> list[int]:
    """A list that receives the signals which ask this process to end, from now on; none ends it at once."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: received.append(caught))
    return received


def _to_torch(batch: MicroBatch) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """As DeepSpeed's engine takes it: (inputs of the first stage, labels of the last)."""
    return (torch.from_numpy(batch.input_ids), torch.from_numpy(batch.cu_seqlens)), torch.from_numpy(batch.labels)


def _data(args: TrainArguments, plan: Plan) -> list[str]:
    if plan.train is None:
        return []
    tables = [f"{t.source}: {t.rows:,} rows, {t.tokens:,} tokens" for t in plan.train.tables]
    tokens = batch_plan(args, plan.mesh, 0).global_batch * args.seq_len
    return [*tables, f"{plan.total_steps:,} steps of {'at most ' if args.ragged else ''}{tokens:,} tokens"]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return dist.get_rank()


def _log(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)
