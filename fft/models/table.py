"""A table of all model types that transformers knows: which are exact, which are refused and why, what each does.

Nothing in it is written by hand: a small model of every type is made, checked, and compared with transformers.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fft.errors import UserError, one_line
from fft.models.baichuan import BaichuanConfig, NormalizedHead
from fft.models.in_process import BOUNDS, Differences, compare_directory, write_random_model
from fft.models.layers import decoder_half
from fft.models.recurrent import KIND, check_recurrent
from fft.models.rotary import Rotary
from fft.models.small import small_config
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES, check_supported
from fft.models.vision import PARTS
from fft.parallel.tensor_plan import check_expert_parallel, check_tensor_parallel, published_plan

#: What a type can be. "differs" is a fault of ours, and stands in no page.
EXACT, DIFFERS, REFUSED, UNTESTED = "exact", "differs", "refused", "untested"
#: Tokens of a window that is shorter than the longest document.
_WINDOW = 4


@dataclass(frozen=True)
class TypeRow:
    """What is known of a model type; ``why`` is what was measured, or the sentence that refuses it."""

    kind: str
    verdict: str
    why: str
    mechanisms: str = ""
    halves: str = ""
    tensor: str = ""
    cut: str = ""
    sequence: str = ""
    experts: str = ""

    def cells(self) -> list[str]:
        """As the page has them."""
        own = [getattr(self, field.name) for field in fields(self)[2:]]
        return [f"`{self.kind}`", *(own if self.verdict in (EXACT, DIFFERS) else own[:1])]

    def same_as(self, other: "TypeRow") -> bool:
        """Whether both say the same, but for the rounding that was measured."""
        exact = self.verdict == other.verdict == EXACT
        return self == (replace(other, why=self.why) if exact else other)


def every_type() -> list[str]:
    """Model types of language models, those of transformers and our own."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, BaichuanConfig.model_type})


def measured(kind: str) -> TypeRow:
    """The row of a model type: a small model of it, and where it is trained, compared with transformers."""
    try:
        config = config_of(kind)
    except Exception as error:  # config classes raise what their checks happen to raise
        return TypeRow(kind, UNTESTED, f"no small config of it could be made: {one_line(error)[:160]}")
    try:
        check_supported(config, BOUNDS[-1])
    except UserError as error:
        return TypeRow(kind, REFUSED, str(error).replace(", ".join((*FAMILIES, *PARTS)), "those that are exact"))
    if {"vision_config", "audio_config"} & set(type(config).sub_configs):
        return TypeRow(kind, UNTESTED, "here: it takes more than text")
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config, Path(folder), seed=0)
        found = compare_directory(config, Path(folder))
    spec = ModelSpec(config, torch.float32)
    row = TypeRow(kind, EXACT if found.within else DIFFERS, _told(found), mechanisms=", ".join(_mechanisms(spec)))
    return replace(
        row,
        halves=_yes(all(_can(decoder_half, layer, h) for layer in _layers(spec) for h in ("attention", "mlp"))),
        tensor=_yes(_can(check_tensor_parallel, config, 2)),
        cut=", ".join(_cut(spec)),
        sequence=_yes(_can(check_recurrent, config, 2)),
        experts=_yes(bool(spec.experts) and _can(check_expert_parallel, config, 2)),
    )


def has_windows(kind: str) -> bool:
    """Whether layers of a model type can have windows."""
    return hasattr(CONFIG_MAPPING[kind], "sliding_window")


def config_of(kind: str) -> PretrainedConfig:
    """A small one; with a window shorter than documents where layers can have windows; or the type's default.

    Raises whatever the config's class does where its default is none.
    """
    windows = {"sliding_window": _WINDOW, "use_sliding_window": True, "max_window_layers": 1}
    try:
        return small_config(kind, **(windows if has_windows(kind) and kind in FAMILIES else {}))
    except Exception:  # its sizes are called by other names
        return CONFIG_MAPPING[kind]()


def _told(found: Differences) -> str:
    loss, gradient = (f"{off:.0e}" if off else "0" for off in (max(found.loss, found.balance), found.gradient))
    text = f"loss {loss}, gradients {gradient}"
    return f"{text}; only one trains {', '.join(found.untrained)}" if found.untrained else text


def _mechanisms(spec: ModelSpec) -> Iterable[str]:
    """What a model does that not all do."""
    config, model = spec.config, spec.skeleton
    parameters = dict(model.named_parameters())
    stored = model.state_dict().keys() - parameters.keys()
    kinds = getattr(config, "layer_types", None) or ()
    head = model.get_output_embeddings()
    has = {
        "windows": any(spec.window(layer) for layer in range(config.num_hidden_layers)),
        "capped scores": spec.caps_scores,
        "sinks": any("sink" in name for name in parameters),
        "latent attention": bool(getattr(config, "kv_lora_rank", None)),
        "linear attention": KIND in kinds,
        "ALiBi": bool(getattr(config, "alibi", False)),
        "rotary by layer type": Rotary(model).kind(0) is not None,
        "experts": any(".experts." in name for name in parameters),
        "balance loss": spec.routing is not None,
        "biases that balance experts": any(name.endswith("bias") for name in stored),
        "factors outside of layers": (spec.outside.embedding, spec.outside.logits) != (1.0, 1.0),
        "capped logits": spec.outside.cap is not None,
        "bias of the head": getattr(head, "bias", None) is not None,
        "normalized head": isinstance(head, NormalizedHead),
    }
    return (name for name, here in has.items() if here)


def _cut(spec: ModelSpec) -> Iterable[str]:
    """Which parameters of layers tensor-parallel ranks share out, or why they do not; embedding and head always are."""
    if not published_plan(spec.config):
        return ["no plan"]
    shards = [name for name in spec.shards(0, 2) if ".layers." in name]
    attention = [name for name in shards if "attn" in name or ".attention." in name]
    experts = [name for name in shards if name in spec.experts]
    others = len(shards) > len(attention) + len(experts)
    found = {"attention": bool(attention), "MLP": others, "experts": bool(experts)}
    return [name for name, here in found.items() if here] or ["embedding and head alone"]


def _layers(spec: ModelSpec) -> Iterable[torch.nn.Module]:
    return spec.skeleton.base_model.get_submodule("layers").children()


def _can(function: Callable[..., object], *given: object) -> bool:
    with contextlib.suppress(UserError):
        function(*given)
        return True
    return False


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


_HEADER = ("type", "off by", "does", "`--split_dlayer`", "tensor", "of layers cut", "sequence", "experts")
_SECTIONS = {
    EXACT: ("Exact", _HEADER),
    DIFFERS: ("Differ: a fault", _HEADER),
    REFUSED: ("Refused", ("type", "why")),
    UNTESTED: ("Untested", ("type", "why")),
}


def page(rows: Sequence[TypeRow]) -> str:
    """Markdown of a table for each verdict."""
    text = f"""# Model types

Written by `make docs` (`python -m fft.models`), from what was measured with transformers {transformers.__version__}.
Of each type of language model a small one with random weights is made, of three layers, three packed documents, and
windows shorter than documents where it can have some. **Exact** is what our layers compute in fp32 as transformers
does, a document at a time: `off by` is the relative difference of the loss, and the largest of a gradient, of its norm.
`does` names what not all models do. `tensor`, `sequence` and `experts` say whether `--model_parallel_size`,
`--sequence_parallel_size` and `--expert_parallel_size` can be more than 1; what of layers is not cut, every tensor rank
holds whole. `qwen`, `internlm2` and Baichuan-7B are read as the qwen2 and llama that they are ([inputs](inputs.md)).
"""
    for verdict, (title, header) in _SECTIONS.items():
        own = [row.cells() for row in rows if row.verdict == verdict]
        if own:
            lines = [header, ["---"] * len(header), *own]
            text += f"\n## {title}: {len(own)}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return text


def rows_in(text: str) -> dict[str, TypeRow]:
    """The rows of a :func:`page`, by model type."""
    titles = {title: verdict for verdict, (title, _) in _SECTIONS.items()}
    found, verdict = {}, UNTESTED
    for line in text.splitlines():
        if line.startswith("## "):
            verdict = titles.get(line[3:].rpartition(":")[0], UNTESTED)
        elif line.startswith("| `"):
            kind, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
            found[kind.strip("`")] = TypeRow(kind.strip("`"), verdict, *cells)
    return found
