"""A training run: plan, build, step, evaluate, write a Hugging Face model."""

import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

from fft.arguments import TrainArguments
from fft.checkpoint import hf
from fft.data.loader import BatchPlan, Loader, MicroBatch, step_batches
from fft.data.table import IGNORE
from fft.engine import DTYPES, build_engine, init_distributed, stages
from fft.errors import UserError
from fft.models.causal_lm import ModelSource, canonical_parameters, layer_costs
from fft.ops.documents import Documents
from fft.preflight import Plan, batch_plan, checkpoint_steps, checkpoint_tag, prepare

#: What gloo says when another process is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run(args: TrainArguments) -> int:
    """Run to the end; returns the exit code."""
    world = _world_size()
    plan = prepare(args, world)
    source = ModelSource(plan.config, DTYPES[args.dtype], plan.weights, args.seed)
    bounds = stages(args, source, plan.mesh)
    init_distributed()
    try:
        _log(_describe(args, plan, source, bounds))
        trainer = Trainer(args, plan, source, bounds)
        trainer.train()
        if args.output_dir:
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
    return 0


class Trainer:
    """The loop around DeepSpeed's pipeline engine."""

    def __init__(self, args: TrainArguments, plan: Plan, source: ModelSource, bounds: list[int]) -> None:
        self.args, self.plan = args, plan
        self.engine, self.loss = build_engine(args, source, plan.mesh, bounds, plan.total_steps)
        if _rank() == 0 and args.checkpoint:  # not before: weights that do not fit must not cost an older run
            _start_run_folder(args, plan)
        #: Where every rank has a share of a row's tokens; None where it has whole rows.
        self.parallel = source.parallel
        replica = self.engine.grid.get_data_parallel_id() // plan.mesh.sequence
        self.batches: BatchPlan = batch_plan(args, plan.mesh, replica)
        #: Only the first stage reads ids and only the last reads labels; the others open nothing.
        first, last = self.engine.is_first_stage(), self.engine.is_last_stage()
        self.reads = first or last
        self.training, self.evaluation = (
            reader and reader.for_stage(ids=first, labels=last) for reader in (plan.train, plan.evaluation)
        )

    def train(self) -> None:
        """Take every step of the plan, evaluating and checkpointing along the way."""
        args, plan = self.args, self.plan
        every, tokens_per_step = args.eval_steps, self.batches.global_batch * args.seq_len
        self.evaluate(0)
        started = window = time.perf_counter()
        waited, logged = 0.0, 0
        for step, (batches, wait) in enumerate(self._steps(), start=1):
            waited += wait
            lr = self._learning_rate()
            loss = float(self._step(batches))
            if not np.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {step}: lower --learning_rate or look at the data.")
            if step % args.logging_steps == 0 or step == plan.total_steps:
                now = time.perf_counter()
                rate = (step - logged) * tokens_per_step / (now - window)
                self._report(step, loss, lr, rate, waited / (now - window), now - started)
                window, waited, logged = now, 0.0, step
            else:
                self._record(step=step, loss=loss, lr=lr, grad_norm=self._grad_norm())
            pause = time.perf_counter()
            if args.save_steps and step % args.save_steps == 0:
                self.save_checkpoint(step)
            if step == plan.total_steps or (every and step % every == 0):
                self.evaluate(step)
            # Time spent saving and evaluating is not training time.
            window += time.perf_counter() - pause

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
        last = self.engine.is_last_stage()
        totals = torch.tensor([float(sum(sums)) if last else 0.0, float(trained) if last else 0.0], dtype=torch.float64)
        totals = totals.to(self.engine.device)
        dist.all_reduce(totals)
        if not totals[1]:
            raise UserError(
                f"--eval_data {self.args.eval_data} holds nothing to predict: give documents of 2 tokens or more."
            )
        loss = float(totals[0] / totals[1])
        self._record(step=step, eval_loss=loss, eval_tokens=int(totals[1]))
        _log(f"step {step}/{self.plan.total_steps}  validation loss {loss:.4f} over {int(totals[1]):,} tokens")
        return loss

    def save_model(self, output: str) -> None:
        """Write a Hugging Face directory: every stage its own shard, in parallel; replaces what stands there."""
        staging, shards = hf.staging_dir(output), self.plan.mesh.pipe
        if _rank() == 0:
            hf.start_staging(output)
        dist.barrier()
        if self.engine.grid.get_data_parallel_id() == 0:
            tensors = canonical_parameters(self.engine.module)
            if self.plan.config.get_text_config().tie_word_embeddings and not self.engine.is_first_stage():
                # The last stage's copy of a tied embedding is the first stage's tensor.
                tensors = {name: t for name, t in tensors.items() if "embed_tokens" not in name}
            hf.write_shard(staging, tensors, self.engine.stage_id, shards)
        dist.barrier()
        if _rank() == 0:
            self.plan.config.dtype = DTYPES[self.args.dtype]
            model = self.plan.weights.directory if self.plan.weights else None
            hf.finish(staging, output, self.plan.config, self.plan.tokenizer, shards, model)
        dist.barrier()

    def save_checkpoint(self, step: int) -> None:
        """Write the model after ``step`` into the run folder and drop what exceeds ``--max_num_checkpoints``."""
        run = Path(self.args.checkpoint)
        self.save_model(str(run / checkpoint_tag(step)))
        _log(f"step {step}/{self.plan.total_steps}  checkpoint {run / checkpoint_tag(step)}")
        if _rank() == 0 and self.args.max_num_checkpoints:
            for old in checkpoint_steps(run)[: -self.args.max_num_checkpoints]:
                shutil.rmtree(run / checkpoint_tag(old))

    def _steps(self) -> Iterator[tuple[list[MicroBatch], float]]:
        """Micro-batches of every step, and the seconds this rank waited for them."""
        if not self.reads:
            yield from (([], 0.0) for _ in range(self.plan.total_steps))
            return
        loader = Loader(self.training, self.batches, self.plan.total_samples)
        waited = 0.0
        for batches in loader:
            yield [self._own(batch) for batch in batches], loader.waited - waited
            waited = loader.waited

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """This rank's share of a micro-batch: its tokens, and labels that were shifted before; all boundaries."""
        if self.parallel is None:
            return batch
        documents = Documents.from_padded(torch.from_numpy(batch.cu_seqlens))
        own = self.parallel.tokens(self.parallel.layout(documents.bounds))
        labels = batch.labels[own]
        return MicroBatch(batch.input_ids[:, own], labels, batch.cu_seqlens, int(np.count_nonzero(labels != IGNORE)))

    def _step(self, batches: list[MicroBatch]) -> torch.Tensor:
        """One optimizer step; returns the mean loss over the trained tokens of the global batch."""
        if self.engine.is_last_stage():
            trained = torch.tensor(sum(b.trained for b in batches), dtype=torch.int64, device=self.engine.device)
            dist.all_reduce(trained, group=self.engine.grid.get_data_parallel_group())
            axis = self.engine.grid.get_data_parallel_world_size()
            self.loss.scale = axis * self.batches.micro_batches / max(1, int(trained))
        return self.engine.train_batch(map(_to_torch, batches))

    def _report(self, step: int, loss: float, lr: float, rate: float, waiting: float, elapsed: float) -> None:
        norm, total = self._grad_norm(), self.plan.total_steps
        self._record(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens_per_second=rate,
            data_wait=waiting,
            seconds=elapsed,
        )
        left = elapsed / step * (total - step)
        _log(
            f"step {step}/{total}  loss {loss:.4f}  lr {lr:.2e}  grad norm {norm:.3f}  {rate:,.0f} tokens/s  "
            f"data wait {waiting:.1%}  {_clock(elapsed)} < {_clock(left)}"
        )

    def _record(self, **metrics: float) -> None:
        if _rank() == 0 and self.args.checkpoint:
            with open(Path(self.args.checkpoint) / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(metrics) + "\n")

    def _learning_rate(self) -> float:
        """The rate the next step will use."""
        return self.engine.get_lr()[0]

    def _grad_norm(self) -> float:
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")


def _to_torch(batch: MicroBatch) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """As DeepSpeed's engine takes it: (inputs of the first stage, labels of the last)."""
    return (torch.from_numpy(batch.input_ids), torch.from_numpy(batch.cu_seqlens)), torch.from_numpy(batch.labels)


def _start_run_folder(args: TrainArguments, plan: Plan) -> None:
    run = Path(args.checkpoint)
    run.mkdir(parents=True, exist_ok=True)
    for step in checkpoint_steps(run):
        shutil.rmtree(run / checkpoint_tag(step))
    (run / "metrics.jsonl").unlink(missing_ok=True)
    settings = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
    (run / "arguments.yaml").write_text(settings, encoding="utf-8")
    # Which tables, at which versions, in which order: what a later run must find to go on with this one.
    data = {"train_data": plan.train and plan.train.identity, "eval_data": plan.evaluation and plan.evaluation.identity}
    (run / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _describe(args: TrainArguments, plan: Plan, source: ModelSource, bounds: list[int]) -> str:
    flops, parameters = layer_costs(source, args.seq_len, args.split_dlayer)
    lines = [
        f"{plan.config.model_type}, {sum(parameters) / 1e6:.2f} M parameters, {args.dtype}; "
        f"world {plan.mesh.world} = data {plan.mesh.data} x pipe {plan.mesh.pipe} x sequence {plan.mesh.sequence}",
        f"{'stage':>5}  {'layers':>7}  {'parameters':>12}  {'time':>6}",
    ]
    for stage, (a, b) in enumerate(itertools.pairwise(bounds)):
        share = sum(flops[a:b]) / sum(flops)
        lines.append(f"{stage:>5}  {f'{a}-{b - 1}':>7}  {sum(parameters[a:b]):>12,}  {share:>6.1%}")
    if plan.train is not None:
        lines += [f"{t.source}: {t.rows:,} rows, {t.tokens:,} tokens" for t in plan.train.tables]
        tokens = batch_plan(args, plan.mesh, 0).global_batch * args.seq_len
        lines.append(f"{plan.total_steps:,} steps of {tokens:,} tokens")
    return "\n".join(lines)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return dist.get_rank()


def _log(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
