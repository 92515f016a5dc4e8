"""Flags of the trainer: one table of names, types and meanings, for the command line and for YAML files alike."""

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from fft.errors import Parser, UserError

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

#: Linear layers that LoRA adapts, as most decoders name them.
LORA_MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def _flag(help: str, default: object = MISSING, **extra: object) -> object:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class TrainArguments:
    """Everything a run is made of. Names are those of the flags; ``jllm`` users will recognise most."""

    # What to train, on what, to where
    model: str = _flag("Hugging Face model directory; with --init a config.json or a directory that has one", None)
    init: bool = _flag("start from random weights (seeded) instead of loading them", False)
    tokenizer: str | None = _flag("tokenizer directory copied into --output_dir (default: --model's own)", None)
    train_data: str | None = _flag(
        "token table to train on: a folder of parquet files or a Delta table (PATH@v3: version 3); or several, each "
        "with the weight of its samples: 'web:0.7 books:0.3'",
        None,
    )
    eval_data: str | None = _flag("token table to evaluate on", None)
    output_dir: str | None = _flag("Hugging Face model directory to write at the end", None)
    overwrite: bool = _flag("allow an existing --output_dir or --checkpoint run to be replaced", False)
    # Which parameters
    lora_dim: int = _flag("train low-rank adapters of this rank alone, and write them as PEFT does (0: the model)", 0)
    lora_alpha: int = _flag("what an adapter adds is multiplied by this / --lora_dim", 16)
    lora_module_name: str = _flag("linear modules of the decoder layers that get adapters", LORA_MODULES)
    freeze: str | None = _flag("do not train parameters whose name has one of these regular expressions, a,b,c", None)
    # How long, how much at a time
    seq_len: int = _flag("tokens of a sample", 2048)
    pack: str = _flag(
        "make samples of rows that are not packed to --seq_len: cut = lay them end to end and cut, nothing unused; "
        "best-fit = cut only rows longer than a sample",
        "cut",
        choices=("cut", "best-fit"),
    )
    ragged: bool = _flag(
        "make micro-batches as long as their documents: what rows and the last batch leave unused is not computed "
        "(full rows save nothing); costs a message of shapes with every micro-batch between stages, which wait for the "
        "longest; loss and weights stay the same, but that the balance of experts counts no unused tokens",
        False,
    )
    shuffle_lanes: int = _flag(
        "places of --train_data that are read side by side: more shuffle better and hold more in memory; data-parallel "
        "replicas whose number divides it decode no row group twice",
        32,
    )
    blend_end: str = _flag(
        "what a table of a blend does that has been read once: repeat = it begins again, in another order; drop = it "
        "leaves the blend until all have been read",
        "repeat",
        choices=("repeat", "drop"),
    )
    per_device_train_batch_size: int = _flag("samples of a micro-batch", 1)
    gradient_accumulation_steps: int = _flag("micro-batches of a step, per data-parallel replica", 1)
    num_train_epochs: float = _flag("passes over --train_data; 0 only converts", 1.0)
    max_steps: int = _flag("stop after this many steps, whatever the epochs (-1: epochs decide)", -1)
    # Optimizer
    learning_rate: float = _flag("peak learning rate", 1e-4)
    min_learning_rate: float = _flag("where the schedule ends", 0.0)
    lr_scheduler_type: str = _flag(
        "decay after the warm-up; wsd (warmup-stable-decay) is constant but for its end",
        "cosine",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_ratio: float = _flag("share of all steps at whose end wsd decays, linearly", 0.1)
    warmup_steps: int = _flag("steps of linear warm-up", 0)
    weight_decay: float = _flag("AdamW's decay of matrices (never of norms and biases)", 0.1)
    adam_beta1: float = _flag("AdamW's first beta", 0.9)
    adam_beta2: float = _flag("AdamW's second beta", 0.95)
    adam_epsilon: float = _flag("AdamW's epsilon", 1e-8)
    max_grad_norm: float = _flag("clip the global gradient norm to this (0: never)", 1.0)
    dtype: str = _flag(
        "type of weights and activations; masters and moments are fp32",
        "bf16",
        choices=("bf16", "fp16", "fp32"),
    )
    attention: str = _flag(
        "attention kernel, which is compared with the reference before the first step; auto takes the device's fastest "
        "that is installed and right (docs/attention.md)",
        "auto",
        choices=(
            "auto",
            "reference",
            "cpu",
            "cuda",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
            "npu",
        ),
    )
    fused_ops: str = _flag(
        "auto: one kernel each for RMSNorm, rotary embedding and SwiGLU, on NPUs and on GPUs that have liger-kernel; "
        "none: as transformers computes them",
        "auto",
        choices=("auto", "none"),
    )
    zero_stage: str = _flag(
        "1 shares masters and moments out over the data- and sequence-parallel ranks; 0 gives every rank all of them, "
        "in fp32 only; auto is 0 for fp32 on a single such rank, and 1 otherwise",
        "auto",
        choices=("auto", "0", "1"),
    )
    offload_optimizer: bool = _flag("keep masters and moments in the machine's memory, and step there: slower", False)
    seed: int = _flag("seed of the initial weights and of the table's order", 0)
    # Layout
    pipe_parallel_size: int = _flag("pipeline stages", 1)
    model_parallel_size: int = _flag("ranks that share the parameters of a layer (tensor parallel)", 1)
    sequence_parallel_size: int = _flag("ranks that share the tokens of a micro-batch: for very long rows", 1)
    ulysses_degree: int = _flag(
        "so many neighbours of the sequence-parallel ranks exchange heads, rings of keys run across (1: rings only)", 1
    )
    encoder_pipe_parallel_size: int = _flag("pipeline stages of a vision encoder (this release: 0)", 0)
    partition_method: str = _flag(
        "stages by fast (equal time), mem (equal memory), parameters, uniform, or layers per stage: 5,4,4", "fast"
    )
    split_dlayer: bool = _flag("let attention and MLP of a decoder layer fall on different stages", False)
    checkpoint_grad_interval: int = _flag("recompute activations of every k layers in backward (0: keep them)", 0)
    checkpoint_grad_selective: bool = _flag(
        "keep the results of matrix products and attention, recompute the rest of every layer in backward: about half "
        "the memory of activations for little time",
        False,
    )
    # Planning
    dry_run: bool = _flag(
        "print the layout, its memory and its bubble, and end: needs no weights, data or devices", False
    )
    ranks: int = _flag(
        "how many ranks --dry_run plans for (0: as many as were launched); given to fft.parity, how many it starts", 0
    )
    device_memory: float = _flag(
        "GB of a device: --dry_run ends with exit code 1 where a stage needs more (0: any)", 0.0
    )
    # Watching and keeping
    eval_steps: int = _flag("evaluate every k steps, besides before the first and after the last (0: only those)", 0)
    early_stop_patience: int = _flag(
        "end the run after k evaluations in a row without a lower validation loss (0: never)", 0
    )
    logging_steps: int = _flag("print every k steps", 10)
    checkpoint: str | None = _flag("run folder: metrics.jsonl, the resolved settings, checkpoints", None)
    save_steps: int = _flag("write a checkpoint into --checkpoint every k steps (0: never)", 0)
    only_ckpt_model: bool = _flag("checkpoints hold the model alone: smaller, but no run goes on from them", False)
    max_num_checkpoints: int = _flag("keep the newest k checkpoints (0: all)", 0)
    best_of: int = _flag("keep, besides the newest, the k of lowest validation loss; evaluates before each save", 0)
    background_executor: str = _flag(
        "who writes a checkpoint while training goes on: a thread, a process, or none: training waits",
        "thread",
        choices=("thread", "process", "none"),
    )
    resume: str | None = _flag(
        "go on with the run in --checkpoint, from its newest whole checkpoint (auto; or else from the start) "
        "or from the one named, for example step-100",
        None,
    )
    from_ckpt: str | None = _flag("take the weights from a checkpoint in this run folder instead of --model", None)
    tag: str | None = _flag("which checkpoint of --from_ckpt, for example step-100 (default: the newest)", None)


def build_parser() -> argparse.ArgumentParser:
    """The trainer's parser. Flags that were not given are absent, so that a YAML file can fill them."""
    parser = Parser(
        prog="fft/train.py",
        description="Train a Hugging Face decoder on token tables that Spark wrote, in pipeline and data parallel.",
        epilog=_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flag names and values")
    for spec in fields(TrainArguments):
        text = spec.metadata["help"]
        if spec.type is bool:
            parser.add_argument(f"--{spec.name}", action="store_true", help=text)
            continue
        if spec.default not in (None, MISSING):
            text += f" (default: {spec.default})"
        parser.add_argument(
            f"--{spec.name}",
            type=_plain_type(spec.type),
            choices=spec.metadata.get("choices"),
            metavar=None if "choices" in spec.metadata else spec.name.rsplit("_", 1)[-1].upper(),
            help=text,
        )
    # Launchers append these; DeepSpeed's settings are derived from the flags above.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Command line over YAML over defaults. Raises :class:`UserError` for unknown or mistyped settings."""
    return resolve(vars(build_parser().parse_args(argv)))


def resolve(given: dict) -> TrainArguments:
    """The arguments that flags, as :func:`build_parser` leaves them, and the file named by ``config`` make together."""
    given = {
        name: value for name, value in given.items() if name not in ("local_rank", "deepspeed", "deepspeed_config")
    }
    config = given.pop("config", None)
    settings = {**(_read_yaml(config) if config else {}), **given}
    arguments = TrainArguments(**settings)
    _check(arguments)
    return arguments


def _read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise UserError(f"--config {path} does not exist.")
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"--config {path} must map flag names to values.")
    known = {spec.name: spec for spec in fields(TrainArguments)}
    return {name: _typed(path, known, name, value) for name, value in raw.items()}


def _typed(path: str, known: dict, name: str, value: object) -> object:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise UserError(f"--config {path}: unknown setting {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}.")
    kind = _plain_type(known[name].type)
    try:
        converted = None if value is None and known[name].default is None else _converted(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"--config {path}: {name} must be of type {kind.__name__}, not {value!r}.") from None
    choices = known[name].metadata.get("choices")
    if choices and converted not in choices:
        raise UserError(f"--config {path}: {name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
    return converted


def _converted(value: object, kind: type) -> object:
    """A YAML scalar as the type of its flag; YAML 1.1 reads 1e-4 as a string. Raises where the two do not fit."""
    if value is None or isinstance(value, (list, dict)) or isinstance(value, bool) != (kind is bool):
        raise ValueError
    converted = kind(value)
    if kind is int and float(value) != converted:
        raise ValueError
    return converted


def _plain_type(annotation: object) -> type:
    """``str | None`` -> str."""
    return annotation if isinstance(annotation, type) else annotation.__args__[0]


def _check(args: TrainArguments) -> None:
    """Faults that need nothing but the flags themselves."""
    for name in (
        "seq_len",
        "shuffle_lanes",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1.")
    for name in (
        "num_train_epochs",
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "weight_decay",
        "adam_epsilon",
        "max_grad_norm",
        "eval_steps",
        "early_stop_patience",
        "save_steps",
        "max_num_checkpoints",
        "best_of",
        "checkpoint_grad_interval",
        "lora_dim",
        "ranks",
        "device_memory",
        "seed",
    ):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative.")
    for spec in fields(args):
        if spec.type is float and not math.isfinite(getattr(args, spec.name)):
            raise UserError(f"--{spec.name} {getattr(args, spec.name)} must be a finite number.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 0 and less than 1.")
    if not 0 <= args.decay_ratio <= 1:
        raise UserError(f"--decay_ratio {args.decay_ratio} must be a share of all steps, from 0 to 1.")
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
    if args.encoder_pipe_parallel_size:
        raise UserError("--encoder_pipe_parallel_size: this release trains no vision encoders; leave it at 0.")
    if not args.model and not args.from_ckpt:
        raise UserError("--model is missing: give a Hugging Face model directory, or a config.json with --init.")
    if args.init and args.from_ckpt:
        raise UserError("--init and --from_ckpt exclude each other: random weights or a checkpoint's.")
    if args.tag and not args.from_ckpt:
        raise UserError("--tag names a checkpoint of --from_ckpt, which is missing.")
    if args.lora_dim and (args.init or args.freeze):
        other = "--init, whose weights would be nowhere" if args.init else "--freeze: all else is frozen"
        raise UserError(f"--lora_dim trains adapters of an existing model alone, not with {other}.")
    if args.lora_dim and args.lora_alpha < 1:
        raise UserError(f"--lora_alpha {args.lora_alpha} must be at least 1.")
    if args.dry_run:
        return  # what a run reads and writes is not looked at
    trains = args.num_train_epochs > 0 and args.max_steps != 0
    if trains and not args.train_data:
        raise UserError("--train_data is missing: give a token table, or --num_train_epochs 0 to convert only.")
    if args.save_steps and not args.checkpoint:
        raise UserError("--save_steps needs --checkpoint, the folder to write to.")
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
