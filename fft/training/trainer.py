"""A training run: plan, build or resume, step, evaluate, save, write a Hugging Face model."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist

from fft.arguments import TrainArguments, build_parser
from fft.checkpoint import folder, optimizer_state
from fft.checkpoint.mirror import Mirror
from fft.checkpoint.saver import RankShare, Saver
from fft.checkpoint.stored_run import StoredRun
from fft.data.batches import MicroBatch
from fft.data.views import naming_places
from fft.errors import EXIT_AGAIN, UserError
from fft.models.causal_lm import Ranks, StageBuilder
from fft.models.lora import trained
from fft.models.spec import ModelSpec
from fft.ops import fused
from fft.planning.layout import Layout, describe, plan_layout
from fft.planning.preflight import Plan, batch_plan, doubts, plan_run
from fft.planning.start_adapter import told_start, with_adapter
from fft.redaction import fit_to_print
from fft.text.shown import first_sample, summary_of
from fft.training import run_folder
from fft.training.conclusion import conclude, told_evaluation
from fft.training.dataset_losses import step_by_dataset, with_datasets
from fft.training.early_stop import EarlyStop
from fft.training.engine import (
    StageEngine,
    build_engine,
    check_device,
    check_kernels,
    device_type,
    host_group,
    init_distributed,
    on_host,
)
from fft.training.environment import environment, let_memory_grow, world_size
from fft.training.evaluation import evaluated, measures
from fft.training.export import ModelExport
from fft.training.feed import Feed
from fft.training.meeting import meet
from fft.training.metric_sinks import evaluation_numbers
from fft.training.metrics import Metrics, Stopwatch, mean_balance, open_metrics
from fft.training.mlflow_sink import check_registers
from fft.training.model import model_spec
from fft.training.output import contents_of, keep_aside, write_output
from fft.training.pace import follow
from fft.training.reference import with_references
from fft.training.run_folder import Start
from fft.training.same_run import check_same_run
from fft.training.sample_answers import SampleAnswers
from fft.training.shared_folders import check_shared
from fft.training.stopping import StopRequest, launchers
from fft.training.watch import Watch


def train(args: TrainArguments) -> int:
    """Train as ``args`` say, as one of the ranks that a launcher started; returns the exit code.

    Raises :class:`UserError` for what the user can mend.
    """
    let_memory_grow()
    above = launchers()
    check_device(args)
    # What goes wrong from here on reaches all ranks, with flags and places by their names.
    with Watch(meet(world_size()), args.timeout) as watch, build_parser().naming_flags(), naming_places():
        args = with_adapter(args)
        plan = plan_run(args, world_size())
        check_registers(args, plan.tokenizer)
        spec = model_spec(args, plan.config, plan.images)
        layout = plan_layout(args, spec, plan.mesh, on_host(), plan.load)
        init_distributed(len(watch.meeting.here))
        _announce(args, plan, spec, layout)
        code = _run(args, plan, spec, layout, above, watch)
        watch.held.close()  # while the others wait: what fails in it reaches them
        dist.barrier()
    # Not after an error: the others would see a closed connection before they see this rank's message.
    dist.destroy_process_group()
    return code


def _announce(args: TrainArguments, plan: Plan, spec: ModelSpec, layout: Layout) -> None:
    """Tell what is going to be done, once kernels were found to compute what they should."""
    lines = [describe(args, plan.config.model_type, layout)]
    if plan.train is not None:
        for table in plan.train.tables:
            lines.append(summary_of(table))
            lines += table.unread.notes(table.source)
        tokens = batch_plan(args, plan.mesh, 0).global_batch * args.seq_len
        lines += [f"warning: {doubt}" for doubt in doubts(args, plan)]
        lines.append(f"{plan.total_steps:,} steps of {'at most ' if args.ragged else ''}{tokens:,} tokens")
    if args.show_first and plan.train is not None and dist.get_rank() == 0:
        lines.append(first_sample(plan.train, plan.tokenizer, sys.stderr.isatty()))
    _log("\n".join(lines))
    _log(f"kernels: {check_kernels(spec)}")
    asked = "none" if args.compile else args.fused_ops
    if advice := fused.missing(device_type(), asked, plan.config.get_text_config().model_type):
        _log(f"warning: {advice}")
    if args.lora_dim or args.freeze:
        _log(f"{trained(spec.skeleton.parameters()):,} parameters are trained, the others are frozen")
    if spec.lora is not None:
        _log(told_start(args) if plan.adapter is not None else spec.lora.guidance)


def _run(
    args: TrainArguments,
    plan: Plan,
    spec: ModelSpec,
    layout: Layout,
    above: Sequence[psutil.Process],
    watch: Watch,
) -> int:
    """Build or resume, train, write the model; returns the exit code. ``watch`` holds what the run does. Collective."""
    held, control, runs = watch.held, host_group(), run_folder.folders(args)
    check_same_run(args, plan.identity, control)
    check_shared(args, plan.mesh, control)
    start = run_folder.enter(runs, args, plan, control, held, _log) if runs else Start()
    builder = StageBuilder(
        spec, Ranks.join(spec, plan.mesh, args.ulysses_degree), *start.readers(plan, spec.lora is not None)
    )
    engine = build_engine(args, builder, plan.mesh, layout.bounds, plan.total_steps)
    if start.checkpoint is not None:
        _restore(engine, builder, start, start.checkpoint / folder.TRAINING)
    plan = with_datasets(with_references(args, plan, engine, builder, control, _log), control, _log)
    if runs:
        facts = environment(control, engine.device)
        if dist.get_rank() == 0:  # not before: weights that do not fit must not cost an older run
            run_folder.create(runs, args, plan, start, facts)
    export, saver = ModelExport(plan, builder, engine, control), None
    if runs:
        contents = contents_of(args, export, runs[0])
        if args.upload and dist.get_rank() == 0:
            store = StoredRun(args.upload, runs[0].notes)
            held.callback(Mirror(runs[0], store, contents.newest, contents.best, _log).close)
        saver = Saver(contents, args.background_executor, control)
    metrics = open_metrics(args, plan, layout, spec.dtype, engine.device, start, held, _log)
    metrics = dataclasses.replace(metrics, pace=follow(watch, plan.mesh, engine.device, control))
    trainer = Trainer(args, plan, start, builder, engine, export, metrics, saver)
    if args.sample_prompts:
        trainer.samples = SampleAnswers(args, plan, builder, engine, runs, control)
    code = trainer.train(above)
    if code == 0 and args.output_dir:
        write_output(args, export, trainer.state(), trainer.early_stop.best, control, _log)
    if dist.get_rank() == 0:
        conclude(args, plan, trainer.state(), metrics, runs, code == 0)
    return code


def _restore(engine: StageEngine, builder: StageBuilder, start: Start, training: Path) -> None:
    """Take up the optimizer's state and, on the layout that wrote it, the random states."""
    engine.restore(training, builder.shards, start.step, start.state.get("loss_scaler"))
    if start.state["layout"] == dataclasses.asdict(engine.role.mesh):
        optimizer_state.restore_random(training, dist.get_rank(), engine.device)


class Trainer:
    """The loop: steps, and along the way evaluations and checkpoints."""

    def __init__(
        self,
        args: TrainArguments,
        plan: Plan,
        start: Start,
        builder: StageBuilder,
        engine: StageEngine,
        export: ModelExport,
        metrics: Metrics,
        saver: Saver | None,
    ) -> None:
        self.args, self.plan, self.start = args, plan, start
        self.builder, self.engine, self.export = builder, engine, export
        self.metrics, self.saver = metrics, saver
        self.samples: SampleAnswers | None = None
        self._skipped = 0  # in a row
        self.early_stop = EarlyStop.from_state(args.early_stop_patience, start.state.get("early_stop"))
        batches = batch_plan(args, plan.mesh, engine.role.replica)
        chosen = engine.shared.chosen if engine.shared else None
        self.feed = Feed(plan, batches, engine.role, builder.ranks.sequence, start, chosen)

    def train(self, above: Sequence[psutil.Process] = ()) -> int:
        """Take every step of the plan, as long as the launchers ``above`` live; returns the exit code.

        Raises :class:`UserError` where the run cannot go on: no finite loss, or no launcher and nothing to save to.
        """
        first, stop = self.start.step, False
        if self.start.state.get("eval_loss") is None and (not first or self._evaluates(first)):
            self._evaluate_and_keep(first)
        resumable = self.saver is not None and not self.args.only_ckpt_model
        asked = StopRequest(resumable, above)
        watch, step = Stopwatch(first), first
        self.metrics.begin(first)
        steps = () if self.early_stop.over else self.feed.steps()
        for step, (batches, waited) in enumerate(steps, start=first + 1):
            watch.waited(waited)
            self._step(step, batches, watch)
            with watch.paused():
                if (reason := asked.reason) and not resumable:
                    raise UserError(f"stopped {reason} after step {step}: nothing is saved without --checkpoint.")
                stop = self._look_and_save(step, reason is not None)
            if stop or self.early_stop.over:
                break
        if self.saver is not None:
            self.saver.close()
        done = f"step {step}/{self.plan.total_steps}"
        if stop:
            reason = asked.reason or "by the signal of another rank"
            _log(f"stopped {reason} after {done}: saved; the same command with --resume auto goes on from there")
            return EXIT_AGAIN
        if self.early_stop.over:
            _log(
                f"stopped early after {done}: {self.early_stop.stalled} evaluations brought no lower validation loss "
                f"than {self.early_stop.best:.4f}"
            )
        return 0

    def _step(self, step: int, batches: list[MicroBatch], watch: Stopwatch) -> None:
        """Take a step and tell its numbers."""
        engine, total = self.engine, self.plan.total_steps
        for batch in batches if engine.role.counts else ():
            watch.computed(len(batch.labels), self.metrics.work.flops(len(batch.labels), batch.cu_seqlens))
        rate, skipped, scale = engine.learning_rate, engine.skipped, engine.loss_scale
        loss, by_dataset = step_by_dataset(engine, batches, self.plan.train.datasets if self.plan.train else ())
        if not math.isfinite(loss):
            self._fail(f"the loss became {loss} at step {step}: lower --learning_rate or look at the data.")
        # In fp16 steps are skipped until the loss scale has come down to what the gradients bear.
        self._skipped = self._skipped + 1 if engine.skipped > skipped and scale <= 1 else 0
        if self._skipped:
            self._say_skipped(step)
        if loss == 0 and engine.trained_nothing():
            self._say_untrained(step)
        values = {"loss": loss, "lr": rate, "grad_norm": engine.grad_norm}
        values |= mean_balance(self.builder.balance, engine.device) | engine.scaling | measures(engine) | by_dataset
        if step % self.args.logging_steps == 0 or step == total:
            self.metrics.show(step, values, watch.lap(step, total))
        else:
            self.metrics.record(step, **values)

    def _say_skipped(self, step: int) -> None:
        """A step that changed nothing is told; a number of them in a row ends the run."""
        what = f"step {step}: the loss is finite, its gradients are not (norm {self.engine.grad_norm})"
        if self._skipped == self.args.max_skipped_steps:
            self._fail(
                f"{what}, and {self._skipped} steps in a row were skipped (--max_skipped_steps): look at the data and "
                "at the weights that the run began with."
            )
        _log(f"warning: {what}; it is skipped, weights and schedule stay as they are")

    def _fail(self, sentence: str) -> NoReturn:
        """End a run that cannot go on, which all ranks see: what was saved before gets its name first."""
        if self.saver is not None:
            self.saver.close()
        raise UserError(sentence)

    def _say_untrained(self, step: int) -> None:
        """A step without a token to train on ends a run that has not trained on any, and is told in all others."""
        where = f"step {step}: none of its tokens is trained on (labels are -100, or documents of one token)"
        if step == 1:
            raise UserError(f"{where}: look at --train_data, or raise --gradient_accumulation_steps.")
        _log(f"warning: {where}")

    def _look_and_save(self, step: int, asked: bool) -> bool:
        """Evaluate and save where it is time to; returns whether to stop, because some rank was asked to."""
        stop = self.saver is not None and self.saver.step(asked) and step < self.plan.total_steps
        saves = bool(self.args.save_steps) and step % self.args.save_steps == 0
        last = step == self.plan.total_steps
        evaluates = not stop and (self._evaluates(step) or (saves and self.args.best_of > 0))
        with self.metrics.paused():
            self._evaluate_and_keep(step, evaluates, saves or stop or (last and self.args.save_steps > 0))
        return stop

    def _evaluate_and_keep(self, step: int, evaluates: bool = True, saves: bool = False) -> None:
        """Evaluate, and save where it is time to, or where a run that may end early is at its best."""
        lowest = self.early_stop.best
        eval_loss = self.evaluate(step) if evaluates else None
        best = self.early_stop.best < lowest and self.args.early_stop_patience > 0
        saves = saves or (self.early_stop.over and self.args.save_steps > 0)
        if self.saver is not None and (saves or best):
            self.save_checkpoint(self.saver, step, eval_loss)
        elif best and self.args.output_dir:
            keep_aside(self.args.output_dir, self.export, self.state(step, eval_loss))

    def _evaluates(self, step: int) -> bool:
        return step == self.plan.total_steps or (self.args.eval_steps > 0 and step % self.args.eval_steps == 0)

    def evaluate(self, step: int) -> float | None:
        """Mean loss over every predicted token of ``--eval_data``, the same on all ranks; None without a table.

        Of several tables that of the first. Collective. Raises :class:`UserError` for a table in which nothing is
        predicted, and for a loss that is none.
        """
        if self.samples is not None:
            self.samples.take(step, _log)
        found = {name: evaluated(self.engine, self.feed, self.plan, name) for name in self.plan.evaluations}
        if not found:
            return None
        if not math.isfinite(worst := sum(one.loss for one in found.values())):
            self._fail(
                f"the validation loss became {worst} at step {step}: lower --learning_rate, or look at --eval_data and "
                "at the weights that the run began with."
            )
        loss = next(iter(found.values())).loss
        self.early_stop.see(loss)
        self.metrics.record(step, **evaluation_numbers(found))
        batch = batch_plan(self.args, self.plan.mesh, 0).global_batch
        for name, told in found.items():
            _log(told_evaluation(self.plan, batch, step, told, name))
        return loss

    def state(self, step: int | None = None, eval_loss: float | None = None) -> dict:
        """What a checkpoint says of the run after ``step``, or at its end."""
        progress = self.metrics.progress
        if step is None:
            step = progress.step
            eval_loss = progress.last[1] if progress.last and progress.last[0] == step else None
        facts = run_folder.state_of(self.args, self.plan, step, self.feed.state(), eval_loss, self.early_stop)
        return facts | self.metrics.state()

    def save_checkpoint(self, saver: Saver, step: int, eval_loss: float | None) -> None:
        """Begin to write the model after ``step``, and what a run needs to go on from it, into the run folder.

        Collective. Raises :class:`UserError` where it, or the one before it, cannot be written, and for values that are
        no numbers.
        """
        begun, tag, engine = time.perf_counter(), folder.checkpoint_tag(step), self.engine
        training = None
        if not self.args.only_ckpt_model:
            parameters = self.export.parameters
            training = optimizer_state.gather(engine.optimizer, parameters, self.builder.shards, engine.role)
        if (fault := self.export.fault(step, training[0] if training else {})) is not None:
            self._fail(fault)
        share = RankShare(self.export.weights(), training)
        saver.save(tag, share, self.state(step, eval_loss) | {"loss_scaler": engine.scaler_state()})
        self.metrics.record(step, save_seconds=time.perf_counter() - begun)
        _log(f"step {step}/{self.plan.total_steps}  checkpoint {saver.run.shown(tag)}")


def _log(text: str) -> None:
    # Whoever read along may be gone, as with a launcher or a terminal: the run is not to end by that, unsaved.
    with contextlib.suppress(OSError):
        if dist.get_rank() == 0:
            print(fit_to_print(text), file=sys.stderr, flush=True)
