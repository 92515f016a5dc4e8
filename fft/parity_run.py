"""What ``fft.parity`` does: a shrunken copy of a model, a few steps of it by the trainer, and the comparison."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from fft.arguments import TrainArguments, resolve
from fft.checkpoint import adapter
from fft.checkpoint.folder import TRAINING, checkpoint_tag
from fft.checkpoint.fragments import SavedFragments
from fft.errors import UserError
from fft.files import write_file
from fft.models.directory import load_config
from fft.models.in_process import GRADIENT, LOSS, gradient_difference, relative, write_random_model
from fft.models.supported import check_supported
from fft.models.vision import auto_class
from fft.parallel.tensor_plan import heads_of
from fft.parity_reference import Outcome, one_process
from fft.planning.preflight import Plan, plan_run, start_of, tokenizer_of
from fft.training.run_folder import METRICS

#: Largest relative difference of the norm of all gradients in fp32.
NORM = 1e-4
#: Weights may differ by this, absolute and relative; so much of a tensor's values, whose gradients are near zero, by
#: more, but never by a tenth of a step.
WEIGHT, OUTLIERS, OUTLIER_STEPS = 1e-5, 0.005, 0.1


# The model: small, but of the same kind


def shrunken(config: PretrainedConfig, args: TrainArguments) -> PretrainedConfig:
    """The same architecture, small: few layers, heads of 16, experts; vocabulary, tying and grouping of heads stay."""
    whole = copy.deepcopy(config)
    config, small = config.get_text_config(), whole.get_text_config()
    given = "," in args.partition_method  # layers per stage, which must remain that many
    if not given:
        small.num_hidden_layers = min(config.num_hidden_layers, max(2, args.pipe_parallel_size))
    for name, values in vars(config).items():
        if isinstance(values, list) and len(values) == config.num_hidden_layers:  # of each layer
            setattr(small, name, values[: small.num_hidden_layers])
    ranks = args.model_parallel_size * args.ulysses_degree  # that share heads
    heads, kv_heads = heads_of(config)
    small.num_key_value_heads = _fewest(kv_heads, lambda heads: heads > 1 and heads % ranks == 0)
    sharing = _fewest(heads // kv_heads, lambda n: n > 1 and n * small.num_key_value_heads % ranks == 0)
    small.num_attention_heads = sharing * small.num_key_value_heads
    blocks = args.model_parallel_size if args.load_in_4bit else 1  # of 64 inputs, which no rank cuts
    small.hidden_size = max(64 * blocks, 16 * small.num_attention_heads)
    if getattr(config, "head_dim", None) and not getattr(config, "kv_lora_rank", None):
        wider = config.head_dim * config.num_attention_heads != config.hidden_size
        small.head_dim = (2 if wider else 1) * small.hidden_size // small.num_attention_heads
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(config, name, None):
            setattr(small, name, 2 * small.hidden_size)
    _shrink_experts(small, max(4, args.model_parallel_size, args.expert_parallel_size))
    rotary = getattr(small, "rope_parameters", None) or {}
    for name in ("short_factor", "long_factor"):  # one for each of the frequencies, of which there are fewer
        if isinstance(factors := rotary.get(name), list):
            width = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
            rotary[name] = factors[: int(width * rotary.get("partial_rotary_factor", 1.0)) // 2]
    if sections := rotary.get("mrope_section"):  # frequencies of time, height and width
        width = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
        rotary["mrope_section"] = [width // 2 * section // sum(sections) for section in sections]
    small.initializer_range = 0.2  # of this size, gradients tell one layer's mistake from another's rounding
    small.dtype = whole.dtype = torch.float32
    if small is not whole:
        stays = given and args.partition_method.count(",") == args.pipe_parallel_size - 1  # it names all stages
        _shrink_tower(whole, None if stays else max(4, (args.encoder_pipe_parallel_size or 0) - 2))
    return whole


#: At most so many experts a token, groups of experts, and layers before the first that has experts.
_EXPERTS = {
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
}


def _shrink_experts(config: PretrainedConfig, experts: int) -> None:
    """At most so many ``experts``, two of them a token's; the second layer has some."""
    limits = _EXPERTS | dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), experts
    )
    limits["moe_layer_end_index"] = config.num_hidden_layers - 1
    for name, limit in limits.items():
        if getattr(config, name, None):
            setattr(config, name, min(getattr(config, name), limit))


def _shrink_tower(config: PretrainedConfig, most: int | None) -> None:
    """A tower of at most so many layers (None: as many as there are) with heads of 16, whose features have the width of
    the decoder that ``config`` has."""
    vision, width = config.vision_config, config.get_text_config().hidden_size
    layers, heads = ("depth", "num_heads") if hasattr(vision, "depth") else ("num_hidden_layers", "num_attention_heads")
    most = getattr(vision, layers) if most is None else min(getattr(vision, layers), most)
    own = "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"
    small: dict[str, Any] = {layers: most, heads: 2, own: 32, "initializer_range": 0.2}
    small |= dict.fromkeys(("out_hidden_size", "hidden_size"), width) if own == "embed_dim" else {}
    small |= {"out_hidden_size": width} if hasattr(vision, "out_hidden_size") else {}
    small |= {"intermediate_size": 64} if hasattr(vision, "intermediate_size") else {}
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):  # of each kind of block one is left
        if hasattr(vision, name) and max(getattr(vision, name), default=0) >= most:
            small[name] = [1, 3]
    for name, value in small.items():
        setattr(vision, name, value)


def _fewest(number: int, fits: Callable[[int], bool]) -> int:
    """The smallest divisor that fits; the number itself if none does."""
    return next((n for n in range(1, number + 1) if number % n == 0 and fits(n)), number)


# The run


def flags_of(args: TrainArguments, model: Path, output: Path, steps: int) -> TrainArguments:
    """The flags of the run that is compared."""
    quiet = {
        "eval_data": None,
        "eval_steps": 0,
        "sample_prompts": None,
        "best_of": 0,
        "early_stop_patience": 0,
        "resume": None,
        "from_ckpt": None,
        "tag": None,
    }
    keep = {"checkpoint": str(output), "output_dir": None, "save_steps": steps, "max_num_checkpoints": 0}
    rate = max(args.learning_rate, 1e-3)
    return dataclasses.replace(
        args,
        **quiet,
        **keep,
        only_ckpt_model=False,
        background_executor="none",
        model=str(model),
        init=False,
        tokenizer=tokenizer_of(args),  # for texts that it trains on
        max_steps=steps,
        dtype="fp32",
        logging_steps=1,
        learning_rate=rate,
        min_learning_rate=rate * args.min_learning_rate / args.learning_rate if args.learning_rate else 0.0,
        warmup_steps=min(args.warmup_steps, steps // 2),
        adam_epsilon=max(args.adam_epsilon, 1e-5),
        gradient_accumulation_steps=min(args.gradient_accumulation_steps, 4),
    )


def launch(args: TrainArguments, ranks: int, folder: Path) -> None:
    """Run the trainer in ``ranks`` processes of this machine. Raises :class:`UserError` with what it said last."""
    settings = folder / "settings.yaml"
    write_file(settings, yaml.safe_dump(dataclasses.asdict(args)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, str(Path(__file__).with_name("train.py")), "--config", str(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        raise UserError(said[0].removeprefix("error: ") if said else "the run failed: its output stands above.")


def read_outcome(run: Path) -> Outcome:
    """What a run in fp32 left in its folder, with its newest checkpoint's weights and moments."""
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    checkpoint = run / checkpoint_tag(steps[-1]["step"])
    fragments, gradients = SavedFragments(checkpoint / TRAINING), {}
    if (checkpoint / adapter.CONFIG).is_file():
        stored = load_file(checkpoint / adapter.WEIGHTS)
        weights = {name.removeprefix(adapter.PREFIX): value for name, value in stored.items()}
    else:
        config = load_config(str(checkpoint), init=False, weights=False)
        weights = auto_class(config).from_pretrained(checkpoint, trust_remote_code=False).state_dict()
    for name in filter(fragments.__contains__, weights):
        gradients[name] = torch.empty(weights[name].shape)
        fragments.fill(gradients[name].view(-1), name, "exp_avg", 0)
    losses, norms = ([step[name] for step in steps] for name in ("loss", "grad_norm"))
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return Outcome(losses, norms, weights, gradients, evaluations)


# The comparison


@dataclass(frozen=True)
class Difference:
    """Of a parameter: its gradient's, relative to its norm; its values' largest, and the share of those far off."""

    name: str
    gradient: float
    weight: float
    outliers: float


def compare_parameters(run: Outcome, expected: Outcome) -> list[Difference]:
    """All parameters, those with the largest difference of gradients first."""
    whole = float(torch.stack([g.norm() for g in expected.gradients.values()]).norm())
    differences = []
    for name, theirs in expected.gradients.items():
        off = (run.weights[name] - expected.weights[name]).abs()
        outliers = float((off > WEIGHT + WEIGHT * expected.weights[name].abs()).float().mean())
        gradient = gradient_difference(run.gradients[name], theirs, whole)
        differences.append(Difference(name, gradient, float(off.max()), outliers))
    return sorted(differences, key=lambda d: -d.gradient)


def faults(run: Outcome, expected: Outcome, learning_rate: float) -> list[str]:
    """What is beyond the tolerances, a sentence each; nothing when the two agree."""
    found = []
    if run.weights.keys() != expected.weights.keys():
        return [f"the models have different tensors: {sorted(run.weights.keys() ^ expected.weights.keys())}."]
    if run.gradients.keys() != expected.gradients.keys():
        return [f"other parameters are trained: {sorted(run.gradients.keys() ^ expected.gradients.keys())}."]
    for what, ours, theirs, tolerance in (
        ("loss", run.losses, expected.losses, LOSS),
        ("gradient norm", run.norms, expected.norms, NORM),
        ("validation loss", run.evaluations, expected.evaluations, LOSS),
    ):
        if len(ours) != len(theirs):
            found.append(f"{len(ours)} times a {what} instead of {len(theirs)}.")
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
            if not relative(a, b) <= tolerance:
                found.append(f"{what} {number} is {a:.9g} instead of {b:.9g}: more than {tolerance:g} off.")
    for name in expected.weights.keys() - expected.gradients.keys():
        if not torch.allclose(run.weights[name], expected.weights[name], WEIGHT, WEIGHT):
            found.append(f"{name}, which is not trained, has other values.")
    for d in compare_parameters(run, expected):
        if not d.gradient <= GRADIENT:
            found.append(f"the gradient of {d.name} differs by {d.gradient:.1e} of its norm, more than {GRADIENT:g}.")
        if not (d.outliers <= OUTLIERS and d.weight <= OUTLIER_STEPS * learning_rate):
            found.append(
                f"{d.name}: {d.outliers:.2%} of its values are more than {WEIGHT:g} off, one by {d.weight:.1e}."
            )
    return found


def comparison(run: Outcome, expected: Outcome, parameters: int = 8) -> str:
    """The table that is printed."""
    columns = f"{'one process':>12} {'off by':>8}"
    lines = [f"{'step':>4}  {'loss':>11} {columns}  {'grad norm':>11} {columns}"]
    for step, (a, b, c, d) in enumerate(zip(run.losses, expected.losses, run.norms, expected.norms, strict=True), 1):
        row = f"{a:>11.7f} {b:>12.7f} {relative(a, b):>8.1e}  {c:>11.6f} {d:>12.6f} {relative(c, d):>8.1e}"
        lines.append(f"{step:>4}  {row}")
    lines += ["", f"{'gradient off by':>15}  {'a weight by':>11}  {'far off':>7}  largest differences, by parameter"]
    for d in compare_parameters(run, expected)[:parameters]:
        lines.append(f"{d.gradient:>15.1e}  {d.weight:>11.1e}  {d.outliers:>7.2%}  {d.name}")
    return "\n".join(lines)


def compare(given: Mapping[str, Any], steps: int) -> int:
    """Take ``steps`` steps as the flags that were ``given`` say, twice, and print what the two did.

    Returns 0 when all is within the tolerances, 1 when not. Raises :class:`UserError` for settings that cannot be run,
    and when the run fails.
    """
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fft-parity-") as folder:
        model, run = Path(folder, "model"), Path(folder, "run")
        mine = resolve({"output_dir": str(run), **given})
        if mine.objective != "lm":
            raise UserError(f"--objective {mine.objective}: one process is compared for lm alone; leave it out.")
        args = flags_of(mine, model, run, steps)
        ranks = mine.ranks or _fewest_ranks(args)
        if mine.adapter_name_or_path:
            raise UserError(
                "--adapter_name_or_path: it does not fit the small copy of the model that is compared; give its rank "
                "by --lora_dim instead."
            )
        config = load_config(start_of(mine), mine.init, weights=not mine.init)
        check_supported(config, mine.seq_len)
        small = shrunken(config, mine)
        write_random_model(small, model, args.seed)
        plan = plan_run(args, ranks)
        print(_heading(small, plan, ranks), flush=True)
        launch(args, ranks, Path(folder))
        ours, expected = read_outcome(run), one_process(model, args, plan)
    print(comparison(ours, expected))
    found = faults(ours, expected, args.learning_rate)
    verdict = f"{len(found)} differences: {found[0]}" if found else "the run is what one process does."
    print(f"\n{verdict}  Tolerances: losses {LOSS:g}, gradients and their norm {NORM:g}, weights {WEIGHT:g}.")
    return 1 if found else 0


def _fewest_ranks(args: TrainArguments) -> int:
    """As the flags say, with two replicas where a step has several micro-batches, and all experts."""
    replicas, sequence = 2 if args.gradient_accumulation_steps > 1 else 1, max(1, args.sequence_parallel_size)
    shared = math.lcm(replicas * sequence, max(1, args.expert_parallel_size))
    return args.pipe_parallel_size * args.model_parallel_size * shared


def _heading(config: PretrainedConfig, plan: Plan, ranks: int) -> str:
    mesh = plan.mesh
    sizes = f"data {mesh.data} x pipe {mesh.pipe} x sequence {mesh.sequence} x tensor {mesh.tensor}"
    sizes += f", experts over {mesh.expert}" if mesh.expert > 1 else ""
    kind, config = config.model_type, config.get_text_config()
    heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads} keys"
    return (
        f"{ranks} ranks = {sizes} against one process, in fp32\n{kind}: {config.num_hidden_layers} "
        f"layers, hidden size {config.hidden_size}, {heads}, vocabulary {config.vocab_size:,}"
    )
