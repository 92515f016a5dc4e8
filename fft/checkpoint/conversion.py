"""Checkpoints, adapters and DeepSpeed's files as Hugging Face model directories: what the command ``convert`` does."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fft.checkpoint import adapter as adapters
from fft.checkpoint import folder
from fft.checkpoint.card import CARD
from fft.checkpoint.finite import clause_on, not_finite
from fft.checkpoint.fragments import MASTER, SavedFragments
from fft.checkpoint.layer_files import LayerFiles, has_layer_files
from fft.checkpoint.model_folder import staged
from fft.checkpoint.stored_run import run_at
from fft.console import live, say
from fft.data.model_files import check_directory
from fft.data.storage import is_url
from fft.data.views import view
from fft.errors import UserError
from fft.files import write_atomically
from fft.models.directory import Weights, check_whole, has_own_head, load_config, stored_in
from fft.models.lora import DOWN, MAGNITUDE, UP, row_lengths
from fft.models.spec import ModelSpec
from fft.weights import hf
from fft.weights.files import load_tensors
from fft.weights.names import StoredNames, Use, put, taken

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Masters:
    """A checkpoint's weights in the fp32 that its optimizer steps."""

    def __init__(self, checkpoint: Path, stored: StoredNames) -> None:
        self.dtype: torch.dtype | None = None
        self._stored = stored
        self._weights, self._fragments = hf.WeightReader(checkpoint), SavedFragments(checkpoint / folder.TRAINING)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._weights.names

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        stored = self._weights.tensor(name)
        return master_of(stored, self._stored.uses(name, tuple(stored.shape)), self._fragments)


def has_masters(checkpoint: Path) -> bool:
    """Whether a folder holds a training state, in which masters are, where the weights are not fp32 themselves."""
    return any((checkpoint / folder.TRAINING).glob("rank-*.safetensors"))


def master_of(stored: Tensor, uses: Sequence[Use], fragments: SavedFragments) -> Tensor:
    """The fp32 value of which ``stored`` is the rounded one; itself where it is fp32, or was not trained.

    ``uses`` are the parameters that its rows belong to.
    """
    if stored.dtype == torch.float32 or any(use.parameter not in fragments for use in uses):
        return stored
    whole = torch.empty(stored.shape)
    for use in uses:
        rows = torch.empty(use.rows.own_shape)
        fragments.fill(rows.view(-1), use.parameter, MASTER, use.start * stored[:1].numel())
        put(whole, use, rows)
    return whole


class LoraAdapter:
    """A low-rank adapter in a directory, ``given`` as what, and what it makes of weights.

    Of a run's checkpoint, its matrices are the masters. Raises :class:`UserError` for adapters of another kind.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.given, config = f"--lora {directory}", adapters.read_config(directory)
        self.made_for = config.get("base_model_name_or_path")
        self._scale = adapters.scale_of(config, self.given)
        self._transposed, self.dora = bool(config.get("fan_in_fan_out")), bool(config.get("use_dora"))
        self._parts = [f"{DOWN}.weight", f"{UP}.weight", *[MAGNITUDE] * self.dora]
        self._tensors = load_tensors(directory / adapters.WEIGHTS)
        if adapters.saw_four_bits(directory):
            say(
                f"note: {self.given} was trained on the model in four bits (NF4), whose rounded weights it saw; it is "
                "merged into the model as it is"
            )
        if has_masters(directory):
            fragments, plain = SavedFragments(directory / folder.TRAINING), StoredNames({})
            for key, value in self._tensors.items():
                uses = plain.uses(key.removeprefix(adapters.PREFIX), tuple(value.shape))
                self._tensors[key] = master_of(value, uses, fragments)

    @property
    def summand(self) -> adapters.Summand:
        """What of it decides what it may be added to."""
        return adapters.Summand(str(self.directory), self._tensors, self.dora)

    def check(self, names: Iterable[str]) -> None:
        """Raise :class:`UserError` for tensors that belong to none of the weights of these ``names``."""
        keys = [{self._key(name, part) for part in self._parts} for name in sorted(names)]
        unused = sorted(set(self._tensors).difference(*keys))
        if unused:
            raise UserError(f"{self.given}: {unused[0]} {self._why_unused(unused[0])}.")
        if partial := [own for own in keys if 0 < len(own & set(self._tensors)) < len(own)]:
            raise UserError(f"{self.given} lacks {min(partial[0] - set(self._tensors))}: save it again.")

    def adapts(self, name: str) -> bool:
        """Whether it is also of the weight of this name."""
        return self._key(name, self._parts[0]) in self._tensors

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """A ``weight`` in fp32 with what it adds. Raises :class:`UserError` where it does not fit."""
        down, up, *lengths = (self._tensors[self._key(name, part)].float() for part in self._parts)
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise UserError(f"{self.given}: the matrices of {name}, {down.shape} and {up.shape}, are no product.")
        delta = self._scale * (up @ down)
        delta = delta.T if self._transposed else delta
        if delta.shape != weight.shape:
            shape = tuple(weight.shape)
            raise UserError(f"{self.given} has {tuple(delta.shape)} for {name} of {shape}: wrong adapter or model.")
        merged = weight + delta
        if not lengths:
            return merged
        rows = merged.T if self._transposed else merged
        if lengths[0].shape != rows.shape[:1]:
            raise UserError(
                f"{self.given} has {tuple(lengths[0].shape)} lengths for the rows of {name}: save it again."
            )
        rows = (lengths[0] / row_lengths(rows))[:, None] * rows
        return rows.T if self._transposed else rows

    @staticmethod
    def _why_unused(key: str) -> str:
        if key.startswith(f"{adapters.PREFIX}lm_head."):
            return "adapts the output head, which in this model is the embedding: merge it with PEFT"
        if not key.endswith((f".{DOWN}.weight", f".{UP}.weight")):
            return "is no matrix of plain LoRA: merge it with PEFT"
        return "belongs to no weight of the model: wrong adapter or model"

    @staticmethod
    def _key(name: str, part: str) -> str:
        return f"{adapters.PREFIX}{name.removesuffix('.weight')}.{part}"


class Merged:
    """A model with low-rank adapters (LoRA, arXiv 2106.09685) added: ``W + scale * B @ A``, summed in fp32, and, of one
    of DoRA (arXiv 2402.09353), its rows brought to the lengths that the adapter has.

    The sum is given as ``dtype``, or else in the type of ``W``. ``stored`` says how files store what is adapted.
    Raises :class:`UserError` for what :class:`LoraAdapter` refuses, and for one of DoRA beside others: what lengths the
    rows of the sum should have, none of them says.
    """

    def __init__(
        self,
        weights: Weights,
        adapter: Path,
        dtype: torch.dtype | None = None,
        stored: StoredNames | None = None,
        *more: Path,
    ) -> None:
        self._weights, self._sums = weights, dtype
        self._stored = stored or StoredNames({})
        self.adapters = [LoraAdapter(directory) for directory in (adapter, *more)]
        names = {use.parameter for name in weights.names for use in self._stored.uses(name, ())}
        for one in self.adapters:
            one.check(names)
        before = weights.adapters if isinstance(weights, Merged) else ()  # those of a run, whose weights are merged
        adapters.check_sum([one.summand for one in (*before, *self.adapters)])

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._weights.names

    @property
    def dtype(self) -> torch.dtype | None:
        """The type to write tensors in unless another is asked for; None: as they are."""
        return self._weights.dtype

    def tensor(self, name: str) -> Tensor:
        """One of them. Raises :class:`UserError` where an adapter does not fit it."""
        weight = self._weights.tensor(name)
        uses = self._stored.uses(name, tuple(weight.shape))
        adapted = [(use, one) for use in uses for one in self.adapters if one.adapts(use.parameter)]
        if not adapted:
            return weight
        whole = weight.float().clone()
        for use, one in adapted:
            put(whole, use, one.added_to(use.parameter, taken(whole, use)))
        return whole.to(self._sums or weight.dtype)


def shards(weights: Weights, dtype: torch.dtype | None, limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of at most ``limit`` bytes, or of one tensor; floating ones as ``dtype``, or as they are."""
    group: dict[str, Tensor] = {}
    size = 0
    for name in weights.names:
        tensor = weights.tensor(name)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def convert(source: Weights, model: Path, output: str, dtype: str | None, limit: int, card: str | None = None) -> int:
    """Write ``source`` with the config and tokenizer of ``model`` and this ``card``; returns the number of tensors.

    Raises :class:`UserError` when the config cannot be read or is another model's, where nothing can be written, and
    while another process writes there.
    """
    config = load_config(str(model), init=False, weights=False)
    if config.tie_word_embeddings and has_own_head(source):
        config.tie_word_embeddings = False
    check_whole(config, source.names, model)
    kind = DTYPES[dtype] if dtype else source.dtype
    written = number = 0

    def line(seconds: float) -> str:
        return f"{number:,} shards, {written / 1e6:,.0f} MB, {written / 1e6 / seconds:,.0f} MB/s"

    def count(group: Mapping[str, Tensor]) -> None:
        nonlocal number, written
        config.dtype = next((t.dtype for t in group.values() if t.is_floating_point()), config.dtype)
        number, written = number + 1, written + sum(tensor.nbytes for tensor in group.values())

    with ExitStack() as held:
        try:
            staging = held.enter_context(staged(output))
        except OSError as error:
            raise UserError(f"{output} cannot be made ({error.strerror}): choose another folder.") from error
        with live(line, last=True):
            _, odd = write_shards(staging, shards(source, kind, limit), count)
        hf.write_metadata(staging, config, str(model), number, model)
        if card is not None:
            write_atomically(staging / CARD, card)
    tell_odd(odd)
    return len(source.names)


def write_shards(
    staging: Path, groups: Iterable[dict[str, Tensor]], told: Callable[[Mapping[str, Tensor]], None] | None = None
) -> tuple[int, list[str]]:
    """Write groups of tensors as the shards of a model, of each of which ``told`` is told; returns how many there are,
    and the names of tensors that hold what is no number.
    """
    number, odd = 0, []
    for number, group in enumerate(groups, 1):
        hf.write_tensors(staging / f"shard-{number}", group, {"format": "pt"})
        odd += not_finite(group)
        if told is not None:
            told(group)
    for shard in range(number):
        (staging / f"shard-{shard + 1}").rename(staging / hf.shard_name(shard, number))
    return number, odd


def tell_odd(names: Sequence[str]) -> None:
    """Say that tensors of these names were written and hold what is no number."""
    if fault := clause_on(names):
        say(f"warning: {fault}: a model with it may answer nothing; look at what it was made from")


def merged(weights: Weights, adapter: Path, dtype: str | None, model: Path, *more: Path) -> Merged:
    """``weights`` of the directory ``model``'s kind with an adapter added, or several; told where one was made for
    another. Raises :class:`UserError` as all do.
    """
    found = Merged(weights, adapter, DTYPES[dtype] if dtype else None, stored_in(model), *more)
    for one in found.adapters:
        if isinstance(one.made_for, str) and adapters.is_other_base(one.made_for, model):
            say(f"note: {one.given} was made for {one.made_for}; it is added to {model}")
    return found


def open_source(place: str, tag: str | None, model: Path | None, dtype: str | None) -> tuple[Weights, Path, Path]:
    """The weights in a run folder, a checkpoint, a model directory or DeepSpeed's, where their config is, and they.

    ``place`` is a path or URL.

    Raises :class:`UserError` when there are none, when the checkpoint is damaged, and when no config is beside them.
    """
    if not is_url(place) and not Path(place).is_dir():
        raise UserError(f"{place} is no directory: give a run folder, a checkpoint or a model directory.")
    run = run_at(place)
    steps = run.steps()
    if tag or steps:
        tag = run.tag_of(tag) if tag else folder.checkpoint_tag(steps[-1])
        if (is_url(place) and folder.step_of(tag) not in steps) or not (path := run.view(tag)).is_dir():
            have = ", ".join(map(folder.checkpoint_tag, steps)) or "none"
            raise UserError(f"--tag {tag}: {run.shown(tag)} is no checkpoint; {place} holds: {have}.")
    else:
        path = view(place)
    check_directory(path)
    if (path / folder.SUMS).is_file():
        found = folder.fault(path)
        if found is not None:
            raise UserError(f"{found}: choose another checkpoint with --tag.")
    if (path / adapters.CONFIG).is_file() and not (path / hf.CONFIG).is_file():
        base = adapters.read_config(path).get("base_model_name_or_path")
        if model is None and not isinstance(base, str):
            raise UserError(f"{path / adapters.CONFIG} names no model that was adapted: name it with --model.")
        model = model or view(str(base))
        return merged(hf.WeightReader(model), path, dtype, model), model, path
    if has_layer_files(path):
        where = model or path
        if not (where / hf.CONFIG).is_file():
            raise UserError(f"{where} has no config.json for DeepSpeed's layer files: name the --model.")
        config = load_config(str(where), init=False, weights=False)
        return LayerFiles(path, ModelSpec(config, torch.float32)), where, path
    masters = dtype == "fp32" and has_masters(path)
    return Masters(path, stored_in(path)) if masters else hf.WeightReader(path), model or path, path
