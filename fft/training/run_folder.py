"""The folder of a run: taken under its lock, then started afresh or gone on with from a checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
import yaml

from fft.arguments import TrainArguments
from fft.checkpoint import folder
from fft.checkpoint.adapter import AdapterReader
from fft.checkpoint.folder import METRICS
from fft.checkpoint.resume import choose_checkpoint
from fft.checkpoint.run import RunFolder
from fft.checkpoint.stored_run import StoredRun, run_at
from fft.data.batches import Loader
from fft.data.manifest import trained_by
from fft.data.samples import Samples
from fft.errors import UserError, one_line
from fft.json_text import json_value
from fft.planning.outputs import RUN_FLAGS, check_free, check_kept
from fft.planning.preflight import Plan, batch_plan
from fft.redaction import redact_all
from fft.training.early_stop import EarlyStop
from fft.training.same_run import VERSIONS, check_resumed
from fft.weights.hf import WeightReader

#: Settings that say which adapters are trained.
_SHAPES = ("lora_dim", "lora_alpha", "lora_module_name", "use_rslora", "use_dora")
#: Settings that a resumed run may change, but not by accident: its losses will not be those of the run begun.
_TERMS = (
    *("learning_rate", "min_learning_rate", "lr_scheduler_type", "warmup_steps", "decay_ratio"),
    *("num_train_epochs", "max_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lora_dropout"),
)
#: Settings of which an evaluation's loss is made: losses before and after a change are not to be compared.
_MEASURE = ("dpo_beta", "dpo_length_normalized", "dpo_sft_weight")


@dataclass(frozen=True)
class Start:
    """Where a run begins: after ``step`` steps, with what a checkpoint holds; at 0 with nothing."""

    step: int = 0
    checkpoint: Path | None = None
    state: dict = dataclasses.field(default_factory=dict)

    def readers(self, plan: Plan, adapts: bool) -> tuple[WeightReader | None, WeightReader | None]:
        """What the model, and the adapters of one that ``adapts``, are read from."""
        if self.checkpoint is None:
            return plan.weights, plan.adapter
        return (plan.weights, AdapterReader(self.checkpoint)) if adapts else (WeightReader(self.checkpoint), None)


def folders(args: TrainArguments) -> list[RunFolder]:
    """The run's folder, and the one in a store that mirrors it; none without --checkpoint."""
    if not args.checkpoint:
        return []
    run = run_at(args.checkpoint)
    return [run, StoredRun(args.upload, run.notes)] if args.upload else [run]


def enter(
    runs: Sequence[RunFolder],
    args: TrainArguments,
    plan: Plan,
    control: dist.ProcessGroup,
    held: ExitStack,
    log: Callable[[str], None],
) -> Start:
    """Take the folders of this run and say where to begin; ``held`` keeps the locks. Collective.

    The first of ``runs`` is the run's, another one mirrors it. Raises :class:`UserError` when another run has a folder,
    or when this one cannot go on with what is in it.
    """
    if dist.get_rank() == 0:
        for flag, run in zip(RUN_FLAGS, runs, strict=False):
            held.enter_context(run.hold())
            check_free(flag, run.name, args)  # another run may have come and gone since it was found free
            check_kept(flag, run.name, args)
            for told in run.tidy():
                log(f"warning: {told}")
        held.callback(_keep, runs[0], log)
    dist.barrier(control)
    chosen = choose_checkpoint(runs, args.resume, args.overwrite, control, log) if args.resume else None
    if chosen is None:
        if args.resume:
            log(f"no checkpoint in {runs[0].name} yet: starting from the beginning")
        return Start()
    checkpoint = chosen.run.view(chosen.tag)
    state = folder.read_state(checkpoint)
    _compare(args, plan, chosen.shown, state, log)
    log(f"going on from {chosen.shown}")
    return Start(state["step"], checkpoint, state)


def _keep(run: RunFolder, log: Callable[[str], None]) -> None:
    """Have the numbers of a run, which ends, in its folder."""
    try:
        run.keep()
    except (OSError, UserError) as error:
        log(f"warning: {run.name} lacks the last numbers of the run ({one_line(error)}); they are in {run.notes}")


def state_of(
    args: TrainArguments, plan: Plan, step: int, data: dict | None, eval_loss: float | None, early_stop: EarlyStop
) -> dict:
    """The content of a checkpoint's ``training/state.json``; ``data`` is what :meth:`Loader.state_dict` gives."""
    return {
        "format": 1,
        "step": step,
        "eval_loss": eval_loss,
        "global_batch": batch_plan(args, plan.mesh, 0).global_batch,
        "layout": dataclasses.asdict(plan.mesh),
        "early_stop": early_stop.state(),
        "identity": plan.identity,
        "tables": [*_tables("train", plan.train), *(t for e in plan.evaluations.values() for t in _tables("eval", e))],
        "images": plan.images is not None,
        "versions": {name: version(name) for name in VERSIONS},
        "data": data,
        "arguments": redact_all(dataclasses.asdict(args)),
    }


def _evaluations(plan: Plan) -> list[tuple[str, str, Samples | None]]:
    """What a run evaluates on: flag and name, use, table."""
    named = plan.evaluations or {"": None}
    return [(f"eval_data {name}".rstrip(), "eval", reader) for name, reader in named.items()]


def _tables(use: str, data: Samples | None) -> list[dict]:
    """What there is to say of the tables of a run."""
    return [
        {
            **{"use": use, "table": table.path, "version": table.version, "fingerprint": table.fingerprint},
            **{"rows": table.rows, "tokens": table.tokens, "trained": trained_by(table.manifest)},
        }
        for table in (data.tables if data is not None else ())
    ]


def create(runs: Sequence[RunFolder], args: TrainArguments, plan: Plan, start: Start, environment: dict) -> None:
    """Write down a run's settings and environment; leave in its folders only what belongs to the run up to its start.

    Raises :class:`UserError` where they cannot be written to.
    """
    settings = yaml.safe_dump(redact_all(dataclasses.asdict(args)), sort_keys=False)
    # Which tables, at which versions, in which order, and which model: what a later run needs to go on with this one.
    data = {
        name: reader
        and {
            **reader.identity,
            "tables": _tables(use, reader),
            "made_from": [table.origin for table in reader.tables],
        }
        for name, use, reader in (("train_data", "train", plan.train), *_evaluations(plan))
    }
    model = {name: plan.identity[name] for name in ("config", "weights", "tokenizer")}
    numbers = [text.splitlines(keepends=True) for run in runs if (text := run.text(METRICS)) is not None]
    before = [[line for line in lines if _written_by(line, start.step)] for lines in numbers]
    for run in runs:
        if start.checkpoint is None:
            for step in run.steps():
                run.remove(folder.checkpoint_tag(step))
            run.forget()
        elif before:
            run.put(METRICS, "".join(max(before, key=len)))
        run.point_again()
        run.put("arguments.yaml", settings)
        run.put("environment.yaml", yaml.safe_dump(environment, sort_keys=False))
        run.put("data.yaml", yaml.safe_dump(redact_all(data | {"model": model}), sort_keys=False))


def _written_by(line: str, step: int) -> bool:
    """Whether a line of metrics is whole and of a step up to ``step``; the last line of a killed run may be cut."""
    try:
        return line.endswith("\n") and json_value(line)["step"] <= step
    except ValueError:
        return False


def _compare(args: TrainArguments, plan: Plan, checkpoint: str, state: dict, log: Callable[[str], None]) -> None:
    if state["format"] != 1:
        raise UserError(f"{checkpoint} is of format {state['format']}, this release reads 1: use a newer one.")
    before = state["arguments"]
    if before["dtype"] != args.dtype:
        raise UserError(f"--dtype {args.dtype}: {checkpoint} was trained in {before['dtype']}; resume with that.")
    for name in (*_SHAPES, "load_in_4bit", "freeze"):
        if before.get(name, getattr(TrainArguments, name)) != getattr(args, name):
            raise UserError(
                f"--{name} {getattr(args, name)}: {checkpoint} was trained with {before.get(name)}; resume with that."
            )
    batch = batch_plan(args, plan.mesh, 0).global_batch
    if batch != state["global_batch"]:
        raise UserError(
            f"the global batch is {batch} samples, that of {checkpoint} {state['global_batch']}: change "
            "--gradient_accumulation_steps or --per_device_train_batch_size so that replicas x both is the same."
        )
    if plan.train is not None and state["data"] is not None:
        Loader(plan.train, batch_plan(args, plan.mesh, 0), plan.total_samples).load_state_dict(state["data"])
    check_resumed(args, state.get("identity"), plan.identity, checkpoint, log)
    for name in (*_MEASURE, *_TERMS):
        now = getattr(args, name)
        if before.get(name, now) != now:  # a flag may be younger than the checkpoint
            if name in _MEASURE and (args.best_of or args.early_stop_patience):
                raise UserError(
                    f"--{name} {now}: it was {before[name]} in {checkpoint}, and losses that it is part of decide what "
                    "is kept (--best_of, --early_stop_patience): resume with that."
                )
            log(f"warning: --{name} is {now}, it was {before[name]}: losses will differ from before")
