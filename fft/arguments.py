"""Flags of the trainer, from a command line or a YAML file, and which of them contradict one another."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fft.errors import Parser, UserError
from fft.flags import add_flags, check_bounds, read_settings
from fft.json_text import json_value, small_text
from fft.train_arguments import TrainArguments

_EXAMPLES = """examples:
  # a model from scratch, two pipeline stages, on CPU or two GPUs
  deepspeed --num_gpus 2 fft/train.py --init --model conf/models/llama-3m.json --tokenizer runs/tokenizer \\
      --train_data runs/packed/train --eval_data runs/packed/validation --seq_len 512 \\
      --pipe_parallel_size 2 --max_steps 200 --learning_rate 3e-3 --output_dir runs/model

  # continue from a Hugging Face model directory, settings from a file, one of them overridden
  torchrun --nproc_per_node 4 fft/train.py --config conf/mine.yaml --model Qwen3-8B --learning_rate 1e-5

Every flag may also stand in a YAML file (--config) under its name without dashes; the command line wins.
The table's order depends on --seed alone; the same seed gives the same loss at every step.
A run with --checkpoint that is asked to stop (SIGTERM, SIGINT) saves after its step and exits with code 75; the same
command with --resume auto goes on from there, on any layout.
"""

#: Flags that most runs are given; ``--help`` explains these, ``--help_all`` all.
_COMMON = (
    *("config", "model", "train_data", "eval_data", "output_dir", "checkpoint", "seq_len", "learning_rate"),
    *("pipe_parallel_size", "dry_run"),
)

#: What ``--dtype`` calls the types of a config.json.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

#: Flags that launchers append, and that mean nothing to a run.
_LAUNCHERS = {"local_rank", "deepspeed", "deepspeed_config"}


def build_parser() -> Parser:
    """The trainer's parser. Flags that were not given are absent, so that a YAML file can fill them."""
    parser = Parser(
        prog="fft/train.py",
        description="Train a Hugging Face decoder on token tables or JSON lines, in pipeline and data parallel.",
        epilog=_EXAMPLES,
        common=_COMMON,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flag names and values")
    add_flags(parser, TrainArguments)
    # Launchers append these (_LAUNCHERS); DeepSpeed's settings are derived from the flags above.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Command line over YAML over defaults. Raises :class:`UserError` as :func:`resolve` does."""
    return resolve(vars(build_parser().parse_args(argv)))


def resolve(given: dict[str, Any]) -> TrainArguments:
    """The arguments that flags, as :func:`build_parser` leaves them, and the file named by ``config`` make together.

    Raises :class:`UserError` for settings that are unknown, mistyped or out of bounds, or contradict one another.
    """
    given = {name: value for name, value in given.items() if name not in _LAUNCHERS}
    config = given.pop("config", None)
    settings = {**(read_settings(config, TrainArguments) if config else {}), **given}
    if "dtype" not in settings and (kept := _dtype_to_keep(TrainArguments(**settings))):
        settings["dtype"] = kept
    arguments = TrainArguments(**settings)
    check_bounds(arguments)
    _check_training(arguments)
    _check_objective(arguments)
    _check_model(arguments)
    if not arguments.dry_run:  # which looks at nothing that a run reads and writes
        _check_run(arguments)
    return arguments


def _dtype_to_keep(args: TrainArguments) -> str | None:
    """The type of the model that a run without a step would only convert; None where there is none to be read."""
    if args.init or not (args.max_steps == 0 or (args.num_train_epochs == 0 and args.max_steps < 0)):
        return None
    folder, tag = Path(args.from_ckpt or args.model or ""), args.tag or "latest"
    if "://" in (args.from_ckpt or args.model or ""):
        raise UserError(
            "--dtype is missing: a run without a step keeps the type of its model's config.json, but that of a store "
            "is read later; give it."
        )
    try:
        if args.from_ckpt:
            folder /= Path(small_text(folder / tag).strip()).name if _is_own_file(folder / tag) else tag
            if folder.is_symlink() or (folder / "config.json").is_symlink():  # which a run has not made
                return None
        config = json_value(small_text(folder / "config.json"))
        return _DTYPES.get(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # what is wrong with it is found, and said, when it is read in earnest


def _is_own_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _check_training(args: TrainArguments) -> None:
    """Steps, precision and memory."""
    tokens = args.seq_len * args.per_device_train_batch_size * args.gradient_accumulation_steps
    if tokens >= 1 << 31:
        raise UserError(
            f"--seq_len x --per_device_train_batch_size x --gradient_accumulation_steps is {tokens:,}, the tokens of a "
            "rank's step, and must be less than 2,147,483,648: lower one of them."
        )
    if args.early_stop_patience and not (args.eval_data and args.eval_steps):
        raise UserError("--early_stop_patience counts evaluations: it needs --eval_data and --eval_steps.")
    if args.checkpoint_grad_selective and args.checkpoint_grad_interval:
        raise UserError("--checkpoint_grad_selective and --checkpoint_grad_interval exclude each other: drop one.")
    if args.zero_stage == "0" and (args.dtype != "fp32" or args.offload_optimizer):
        raise UserError(
            "--zero_stage 0 is for --dtype fp32 without --offload_optimizer: half types and offloading need the fp32 "
            "sums and masters of stage 1."
        )
    if args.offload_optimizer and args.dtype == "fp16":
        raise UserError("--offload_optimizer with --dtype fp16 never recovers from an overflow: use bf16 or fp32.")


def _check_objective(args: TrainArguments) -> None:
    """What is learned."""
    if args.objective != "dpo":
        default = TrainArguments()
        for name in ("dpo_beta", "dpo_length_normalized", "dpo_sft_weight"):
            if getattr(args, name) != getattr(default, name):
                raise UserError(f"--{name} is for --objective dpo: add that, or leave it out.")
        return
    if args.dpo_beta == 0:
        raise UserError("--dpo_beta 0 must be more than 0: nothing is learned without.")
    if args.init:
        raise UserError("--objective dpo needs a model that answers already, as the reference: leave --init out.")
    if args.compile:
        raise UserError("--objective dpo does not go with --compile: leave one out.")


def _check_model(args: TrainArguments) -> None:
    """Where weights come from, and which are trained."""
    if not args.model and not args.from_ckpt:
        raise UserError("--model is missing: give a Hugging Face model directory, or a config.json with --init.")
    if args.init and args.from_ckpt:
        raise UserError("--init and --from_ckpt exclude each other: random weights or a checkpoint's.")
    if args.tag and not args.from_ckpt:
        raise UserError("--tag names a checkpoint of --from_ckpt, which is missing.")
    adapts = "--adapter_name_or_path" if args.adapter_name_or_path else "--lora_dim" if args.lora_dim else None
    if adapts and (args.init or args.freeze):
        other = "--init, whose weights would be nowhere" if args.init else "--freeze: all else is frozen"
        raise UserError(f"{adapts} trains adapters of an existing model alone, not with {other}.")
    if args.load_in_4bit and not adapts:
        raise UserError("--load_in_4bit is of a model below adapters, which alone are trained: add --lora_dim.")
    for name in ("lora_dropout", "use_rslora", "use_dora"):
        if getattr(args, name) and not adapts:
            raise UserError(f"--{name} is of adapters: give their rank by --lora_dim, or leave it out.")
    if adapts and args.lora_alpha < 1:
        raise UserError(f"--lora_alpha {args.lora_alpha} must be at least 1.")


def _check_run(args: TrainArguments) -> None:
    """What a run reads and writes."""
    trains = args.num_train_epochs > 0 and args.max_steps != 0
    if trains and not args.train_data:
        raise UserError("--train_data is missing: give a token table, or --num_train_epochs 0 to convert only.")
    if args.save_steps and not args.checkpoint:
        raise UserError("--save_steps needs --checkpoint, the folder to write to.")
    if args.upload and not args.checkpoint:
        raise UserError("--upload needs --checkpoint, the folder that it mirrors.")
    if args.resume and not args.checkpoint:
        raise UserError("--resume needs --checkpoint, the folder of the run to go on with.")
    if args.resume and args.only_ckpt_model:
        raise UserError("--resume needs whole checkpoints, which --only_ckpt_model does not write: leave one out.")
    if args.best_of and not (args.eval_data and args.save_steps and args.max_num_checkpoints):
        raise UserError(
            "--best_of chooses by evaluation what else to keep: it needs --eval_data, --save_steps and "
            "--max_num_checkpoints."
        )
    if not (args.output_dir or args.checkpoint):
        raise UserError("--output_dir is missing: name the model directory to write.")
