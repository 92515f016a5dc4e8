"""``--layout auto``: the trainer's settings with the layout that the planner finds for its machines."""

from dataclasses import replace
from pathlib import Path

from fft.console import say
from fft.errors import UserError
from fft.models.spec import DTYPES, ModelSpec
from fft.plan.hardware import read_machine
from fft.plan.ours import Job, choice_flags
from fft.plan.search import Search
from fft.plan.told import layout_name
from fft.planning.preflight import lay_out
from fft.train_arguments import TrainArguments


def with_best_layout(args: TrainArguments, ranks: int, speaks: bool) -> TrainArguments:
    """The arguments with another layout, for ``ranks`` devices; who ``speaks`` says which. All ranks find the same.

    Raises :class:`UserError` for runs that are not planned, and where nothing fits.
    """
    if args.hardware is None:
        raise UserError("--layout auto needs --hardware, a file that describes the machines, as in conf/hardware.")
    _check_planned(args)
    plain = replace(args, pipe_parallel_size=1, model_parallel_size=1, sequence_parallel_size=1, ulysses_degree=1)
    config, _ = lay_out(replace(plain, expert_parallel_size=1), 1)
    tokens = args.tokens_per_step
    if tokens % args.seq_len or not tokens:
        raise UserError(
            f"--tokens_per_step {tokens} must be a multiple of --seq_len {args.seq_len}: --layout auto keeps it."
        )
    job = Job(ModelSpec(config, DTYPES[args.dtype]), config.model_type, plain, tokens)
    found = Search(job, read_machine(Path(args.hardware)), ranks).best(1)
    if not found:
        raise UserError(f"--layout auto: no layout of {ranks} such devices has the memory: start more ranks.")
    plan = found[0]
    if speaks:
        say(
            f"layout: {layout_name(plan)}, predicted {plan.prediction.rate:,.0f} tokens/s, "
            f"{plan.fullest / 1e9:.1f} GB a device"
        )
    return replace(args, **choice_flags(plan.choice, plan.bounds))


def _check_planned(args: TrainArguments) -> None:
    for flag in ("lora_dim", "adapter_name_or_path", "freeze", "ragged"):
        if getattr(args, flag):
            raise UserError(f"--layout auto does not plan runs with --{flag}: set the sizes yourself.")
    if args.dtype != "bf16":
        raise UserError(f"--layout auto plans bf16 alone, not {args.dtype}: set the sizes yourself.")
