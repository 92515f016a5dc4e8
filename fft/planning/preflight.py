"""What can go wrong is found here, before a process group exists: model, tables, sizes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig

from fft.arguments import TrainArguments
from fft.checkpoint.adapter import AdapterReader
from fft.checkpoint.folder import checkpoint_tag
from fft.checkpoint.stored_run import run_at
from fft.corpus.local import is_json_lines, scratch_cache, table_of, text_input
from fft.data.batches import BatchPlan
from fft.data.blend import Blend, parse_evaluations, parse_tables
from fft.data.image_batches import run_rules
from fft.data.manifest import TokenizerInfo, tokenizer_sha256
from fft.data.reader import SampleReader
from fft.data.storage import is_url
from fft.data.table import Table
from fft.data.views import view
from fft.errors import UserError
from fft.images.rules import ImageLimits, ImageRules, check_rules, has_processor, load_rules
from fft.models.compiled import check_compiles
from fft.models.directory import ADAPTER_CONFIG, load_config
from fft.models.recurrent import check_recurrent
from fft.models.supported import check_supported
from fft.models.vision import PARTS, rules_of
from fft.parallel.mesh import MeshSizes, mesh_sizes
from fft.parallel.ring_plan import row_multiple
from fft.parallel.tensor_plan import check_expert_parallel, check_tensor_parallel, heads_of
from fft.planning.identity import identity_of, weights_hash
from fft.planning.image_load import ImageLoad, load_of
from fft.planning.objective import check_pairs
from fft.planning.outputs import TOKENS, check_outputs
from fft.weights.hf import WeightReader


@dataclass(frozen=True)
class Plan:
    """A run whose inputs have been checked. ``evaluations`` are tables by name, the first says what is best; one alone
    may have an empty name. ``total_samples`` counts all epochs, ``total_steps`` optimizer steps; ``load`` is what its
    images weigh, where it has some. ``adapter`` is the one that training goes on with, if there is one."""

    config: PretrainedConfig
    weights: WeightReader | None
    tokenizer: str | None
    mesh: MeshSizes
    train: SampleReader | Blend | None
    evaluations: Mapping[str, SampleReader]
    total_samples: int
    total_steps: int
    load: ImageLoad | None = None
    adapter: AdapterReader | None = None

    @property
    def evaluation(self) -> SampleReader | None:
        """The table whose loss says what is best."""
        return next(iter(self.evaluations.values()), None)

    @property
    def images(self) -> ImageRules | None:
        """The rules of the images that the run sees; None where its tables have none."""
        return next((reader.rules for reader in (self.train, self.evaluation) if reader), None)

    @cached_property
    def identity(self) -> dict:
        """What is trained, see :func:`fft.planning.identity.identity_of`."""
        evaluations, adapter = [*self.evaluations.values()], self.adapter
        known = identity_of(self.config, self.weights, self.tokenizer, self.train, evaluations)
        return known | {"adapter": adapter and weights_hash(adapter.directory)}


def plan_run(args: TrainArguments, world: int) -> Plan:
    """Check a run for ``world`` ranks and plan it. Raises :class:`UserError`."""
    if args.image_tokens is not None:
        raise UserError("--image_tokens is for --dry_run: a run counts the images of its tables; leave it out.")
    config, mesh = lay_out(args, world)
    model, tokenizer = start_of(args), tokenizer_of(args)
    check_outputs(args, model, tokenizer)
    weights = None if args.init else WeightReader(model)
    adapter = AdapterReader(local(args.adapter_name_or_path)) if args.adapter_name_or_path else None
    named = parse_evaluations(args.eval_data) if args.eval_data else {}
    train = _open_all(args, config, tokenizer) if args.train_data else None  # last: texts are tokenized now
    evaluations = {n: _open("eval_data", path, args, config, tokenizer, shuffle=False) for n, path in named.items()}
    tables = [*(train.tables if train else ()), *(t for reader in evaluations.values() for t in reader.tables)]
    if (rules := _image_rules(model, config, tables)) is not None:
        train = train and train.with_images(rules)
        evaluations = {name: reader.with_images(rules) for name, reader in evaluations.items()}
    total_samples, total_steps = _length(args, train, mesh)
    check_encoder_stages(args, config, rules)
    manifests = [table.manifest for table in tables]
    trained = len(train.tables) if train else 0
    load = None if rules is None else load_of(args, rules, manifests[:trained], manifests[trained:])
    return Plan(config, weights, tokenizer, mesh, train, evaluations, total_samples, total_steps, load, adapter)


def doubts(args: TrainArguments, plan: Plan) -> list[str]:
    """What may be meant, but is likely a mistake; a sentence each."""
    found, positions = [], getattr(plan.config.get_text_config(), "max_position_embeddings", None)
    if positions and args.seq_len > positions:
        found.append(
            f"--seq_len {args.seq_len} is more than the {positions} positions of the model (max_position_embeddings): "
            "documents that are longer have positions that it was not made for"
        )
    if args.min_learning_rate > args.learning_rate:
        found.append(
            f"--min_learning_rate {args.min_learning_rate:g} is more than --learning_rate {args.learning_rate:g}: the "
            "rate grows until the end"
        )
    if plan.total_steps and args.warmup_steps >= plan.total_steps:
        found.append(
            f"--warmup_steps {args.warmup_steps} is no less than the run's {plan.total_steps} steps: the rate never "
            "falls"
        )
    return found


def lay_out(args: TrainArguments, world: int) -> tuple[PretrainedConfig, MeshSizes]:
    """The model's config and the sizes of ``world`` ranks, which suit each other. Raises :class:`UserError`."""
    sizes = args.pipe_parallel_size, args.sequence_parallel_size, args.model_parallel_size, args.expert_parallel_size
    mesh = mesh_sizes(world, *sizes)
    config = load_config(start_of(args), args.init or args.dry_run, weights=not args.init)
    check_supported(config, args.seq_len)
    check_tensor_parallel(config, mesh.tensor)
    check_expert_parallel(config, mesh.expert)
    _check_sequence_parallel(args, config)
    if args.compile:
        names = ("ulysses_degree", "expert_parallel_size")
        check_compiles(config, {f"--{name}": getattr(args, name) for name in names})
    return config, mesh


def check_encoder_stages(args: TrainArguments, config: PretrainedConfig, images: ImageRules | None) -> None:
    """Raise :class:`UserError` for ``--encoder_pipe_parallel_size`` where the run has no use for it."""
    if images is not None or not args.encoder_pipe_parallel_size:
        return
    flag = f"--encoder_pipe_parallel_size {args.encoder_pipe_parallel_size}"
    if config.model_type not in PARTS:
        raise UserError(f"{flag}: a {config.model_type} has no vision tower: leave it out.")
    raise UserError(f"{flag}: --train_data has no images, and the tower takes no part: leave it out.")


def _check_sequence_parallel(args: TrainArguments, config: PretrainedConfig) -> None:
    size, degree, tokens = (
        args.sequence_parallel_size,
        args.ulysses_degree,
        args.seq_len * args.per_device_train_batch_size,
    )
    check_recurrent(config, size)
    if tokens % size:
        raise UserError(
            f"--sequence_parallel_size {size} must divide the {tokens} tokens of a micro-batch: change --seq_len."
        )
    if degree < 1 or size % degree:
        raise UserError(f"--ulysses_degree {degree} must divide --sequence_parallel_size {size}.")
    kv_heads = max(1, heads_of(config)[1] // args.model_parallel_size)
    if kv_heads % degree:
        raise UserError(f"--ulysses_degree {degree} must divide the {kv_heads} key/value heads of a rank.")


def batch_plan(args: TrainArguments, mesh: MeshSizes, replica: int) -> BatchPlan:
    """How global batches are dealt to this data-parallel replica."""
    multiple = row_multiple(mesh.sequence) if args.ragged else None
    draws = args.seed if args.lora_dim and args.lora_dropout else None
    size = args.per_device_train_batch_size
    return BatchPlan(mesh.data, replica, args.gradient_accumulation_steps, size, multiple, draws)


def start_of(args: TrainArguments) -> str:
    """The model directory, or ``config.json``, that a run starts from: --model's or a checkpoint of --from_ckpt.

    Raises :class:`UserError` when the checkpoint is none, or an adapter.
    """
    if not args.from_ckpt:
        return local(args.model)
    run = run_at(args.from_ckpt)
    steps = run.steps()
    tag = run.tag_of(args.tag) if args.tag else checkpoint_tag(steps[-1]) if steps else "step-*"
    if tag not in map(checkpoint_tag, steps):
        have = ", ".join(map(checkpoint_tag, steps)) or "none"
        raise UserError(f"--from_ckpt: {run.shown(tag)} is no checkpoint; {args.from_ckpt} holds: {have}.")
    path = run.view(tag)
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--from_ckpt: {path} is an adapter: go on with that run by --resume, begin another with it by --model and "
            f"--adapter_name_or_path {run.shown(tag)}, or merge it by python -m fft.checkpoint.convert "
            f"{args.from_ckpt} OUT --tag {tag}."
        )
    return str(path)


def local(place: str) -> str:
    """The path of a directory, of one in a store that of its view."""
    return str(view(place)) if is_url(place) else place


def tokenizer_of(args: TrainArguments) -> str | None:
    """The directory of a run's tokenizer: --tokenizer's, or the model's if it has one.

    Raises :class:`UserError` when there is none where --tokenizer says.
    """
    model = start_of(args)
    tokenizer = (
        local(args.tokenizer)
        if args.tokenizer
        else (model if (Path(model) / "tokenizer_config.json").is_file() else None)
    )
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer_config.json").is_file():
        raise UserError(f"--tokenizer {tokenizer} is no tokenizer directory: it has no tokenizer_config.json.")
    return tokenizer


def _image_rules(model: str, config: PretrainedConfig, tables: Sequence[Table]) -> ImageRules | None:
    """The rules of the images of a run's tables, which must be the model's; None where no table has any."""
    rules = run_rules(tables)
    if rules is None:
        return None
    where = next(table.path for table in tables if table.has_images)
    check_rules(rules, rules_of(config, rules), where)
    if has_processor(Path(model)):
        check_rules(rules, load_rules(Path(model), ImageLimits(), (rules.start_token, rules.end_token)), where)
    return rules


def _open_all(args: TrainArguments, config: PretrainedConfig, tokenizer: str | None) -> SampleReader | Blend:
    """What is trained on."""
    tables = parse_tables(args.train_data or "", "train_data")
    readers = [_open("train_data", path, args, config, tokenizer, shuffle=True) for path, _ in tables]
    if len(readers) == 1:
        return readers[0]
    return Blend(readers, [weight for _, weight in tables], args.blend_end)


def _open(
    flag: str, path: str, args: TrainArguments, config: PretrainedConfig, tokenizer: str | None, shuffle: bool
) -> SampleReader:
    if is_json_lines(path):
        if is_url(path):
            raise UserError(
                f"--{flag} {path}: JSON lines are read from local or mounted folders: copy the file there, or make a "
                "table of it with spark_jobs/tokenize.py."
            )
        path = str(_tokenized(flag, Path(path), args, config, tokenizer))
    table = Table.open(path)
    table.check_trainable(config.model_type in PARTS)
    check_pairs(args, flag, table)
    made_by = table.manifest.tokenizer if table.manifest else None
    if made_by is not None:
        _check_vocabulary(f"--{flag} {path}", made_by, config)
        if tokenizer is not None and made_by.sha256 != tokenizer_sha256(tokenizer):
            raise UserError(
                f"--{flag} {path} was tokenized with {made_by.name}, not with the tokenizer in {tokenizer}: "
                "tokenize again or name the right --tokenizer."
            )
    reader = SampleReader(
        table, args.seq_len, args.seed, config.get_text_config().vocab_size, shuffle, args.pack, args.shuffle_lanes
    )
    return reader.with_pairs() if table.has_pairs else reader


def _tokenized(flag: str, path: Path, args: TrainArguments, config: PretrainedConfig, tokenizer: str | None) -> Path:
    """The token table of a file of JSON lines, made now if it has not been made before."""
    if tokenizer is None:
        raise UserError(f"--{flag} {path} is text, and --model has no tokenizer: name one with --tokenizer.")
    text = text_input(path, Path(tokenizer), args.seq_len)
    _check_vocabulary(f"--{flag} {path}", text.tokenizer, config)  # not after hours of tokenizing
    own = args.checkpoint if args.checkpoint and not is_url(args.checkpoint) else None
    return table_of(text, Path(own) / TOKENS if own else scratch_cache())


def _check_vocabulary(what: str, made_by: TokenizerInfo, config: PretrainedConfig) -> None:
    vocabulary = config.get_text_config().vocab_size
    if made_by.vocab_size > vocabulary:
        raise UserError(
            f"{what} was tokenized with a vocabulary of {made_by.vocab_size}, larger than the model's "
            f"{vocabulary}: raise vocab_size in the model's config or tokenize with the model's tokenizer."
        )


def _length(args: TrainArguments, train: SampleReader | Blend | None, mesh: MeshSizes) -> tuple[int, int]:
    if train is None or (args.num_train_epochs == 0 and args.max_steps < 0) or args.max_steps == 0:
        return 0, 0
    global_batch = batch_plan(args, mesh, 0).global_batch
    if args.max_steps > 0:
        return args.max_steps * global_batch, args.max_steps
    samples = math.ceil(args.num_train_epochs * train.samples_per_epoch)
    return samples, math.ceil(samples / global_batch)
