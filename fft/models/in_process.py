"""A model directory in one process, by our pipeline layers and by transformers: what the two compute of it.

Who compares a whole run asks :mod:`fft.parity`; here are no engine, no ranks and no steps.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fft.hidden_modules import hidden_module
from fft.models.causal_lm import StageBuilder
from fft.models.layers import Activations, canonical_parameters, pipeline_layers
from fft.models.small import VOCABULARY
from fft.models.spec import ModelSpec
from fft.models.vision import auto_class
from fft.ops.cross_entropy import linear_cross_entropy
from fft.weights.hf import WeightReader

#: Largest relative differences in fp32. That of a gradient is of its norm, but for this part of the whole norm.
LOSS, GRADIENT, FLOOR = 1e-5, 1e-4, 1e-6
#: Documents end here; the last token of each predicts nothing.
BOUNDS = [0, 5, 6, 17]


class InProcess:
    """All pipeline layers of a model in one process, a tied embedding once, as DeepSpeed builds them."""

    def __init__(self, builder: StageBuilder, split: bool = False) -> None:
        self.modules, self.vocabulary = nn.ModuleList(), builder.vocabulary
        self._calls: list[Callable[[Activations], Any]] = []
        tied: dict[str, nn.Module] = {}
        for layer in pipeline_layers(builder, split):
            if layer.tied in tied and layer.forward is not None:
                self._calls.append(partial(layer.forward, tied[layer.tied]))
                continue
            module = layer.build()
            self.modules.append(module)
            self._calls.append(module)
            if layer.tied is not None:
                tied[layer.tied] = module

    def __call__(self, ids: Tensor, bounds: list[int], draws: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the head gives of token ids [1, tokens], documents ending at ``bounds``: hidden states, weight, bias.

        ``draws`` are the numbers by which adapters drop something, int64 [tokens].
        """
        total = ids.shape[1]
        boundaries = torch.tensor(bounds + [total] * (total + 1 - len(bounds)), dtype=torch.int32, device=ids.device)
        activations = (ids.int(), boundaries) if draws is None else (ids.int(), boundaries, draws)
        for call in self._calls:
            activations = call(activations)
        return activations


def documents(vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Token ids [1, 17] of three documents, and their labels."""
    ids = torch.randint(vocabulary, (1, BOUNDS[-1]), generator=torch.Generator().manual_seed(0))
    labels = ids[0].roll(-1)
    labels[[bound - 1 for bound in BOUNDS[1:]]] = -100
    return ids, labels


def loss_by_layers(run: InProcess, vocabulary: int = VOCABULARY) -> Tensor:
    """Sum of the token losses of :func:`documents`, packed into a row."""
    device = next(run.modules.parameters()).device
    ids, labels = (x.to(device) for x in documents(vocabulary))
    hidden, weight, *bias = run(ids, BOUNDS)
    return linear_cross_entropy(hidden, weight, labels, run.vocabulary, *bias)


def loss_by_transformers(model: PreTrainedModel, vocabulary: int = VOCABULARY) -> Tensor:
    """The same, a document at a time."""
    ids, labels = documents(vocabulary)
    losses = [
        nn.functional.cross_entropy(model(ids[:, a:b]).logits[0], labels[a:b], reduction="sum", ignore_index=-100)
        for a, b in itertools.pairwise(BOUNDS)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def balance_by_transformers(model: PreTrainedModel) -> Tensor:
    """The experts' balance loss of the same: that of a layer's tokens together, the mean over layers."""
    ids, _ = documents()
    seen = [model(ids[:, a:b], output_router_logits=True).router_logits for a, b in itertools.pairwise(BOUNDS)]
    measure = sys.modules[type(model).__module__].load_balancing_loss_func
    made: Any = model  # of a class that says how many experts there are, beside the function that it uses
    layers = [(torch.cat(logits),) for logits in zip(*seen, strict=True)]
    return torch.stack([measure(logits, made.num_experts, made.num_experts_per_tok) for logits in layers]).mean()


def loaded(directory: Path) -> PreTrainedModel:
    """What transformers makes of a directory, in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()


def write_random_model(config: PretrainedConfig, directory: Path, seed: int) -> None:
    """A Hugging Face directory of random weights, norms and biases too, which would hide mistakes as ones and zeros.

    So would routers of nothing but zeros, as some versions of transformers begin with: whom a tie falls to depends on
    the device.
    """
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim < 2 or bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    # accelerate would import DeepSpeed, for seconds, to see that the model is no engine of its.
    with hidden_module("deepspeed"):
        model.save_pretrained(directory)


def gradient_difference(ours: Tensor, theirs: Tensor, whole: float) -> float:
    """Relative to the norm of what is expected; ``whole`` is that of all parameters' gradients together."""
    return float((ours - theirs).norm()) / (float(theirs.norm()) + whole * FLOOR / GRADIENT)


def gradient_differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """:func:`gradient_difference` of every gradient that both have."""
    whole = float(torch.stack([grad.norm() for grad in theirs.values()]).norm())
    return {name: gradient_difference(ours[name], theirs[name], whole) for name in ours.keys() & theirs.keys()}


def relative(ours: float, theirs: float) -> float:
    """Difference relative to what is expected."""
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


@dataclass(frozen=True)
class Differences:
    """Relative ones of a loss, of the experts' balance loss, and of the gradient that differs most, by name.

    ``untrained`` are the parameters that have a gradient in one of the two alone.
    """

    loss: float
    balance: float
    gradient: float
    parameter: str
    untrained: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether both compute the same, but for rounding."""
        close = max(self.loss, self.balance) <= LOSS and self.gradient <= GRADIENT
        return close and not self.untrained


def compare_directory(config: PretrainedConfig, directory: Path) -> Differences:
    """Of the model in ``directory``: loss and gradients of :func:`documents` by our layers and by transformers.

    Raises :class:`UserError` for a model that cannot be read.
    """
    builder = StageBuilder(ModelSpec(config, torch.float32), weights=WeightReader(directory))
    run, model = InProcess(builder), loaded(directory)
    if builder.balance is not None:
        builder.balance.weight = 0.0
    loss, expected = loss_by_layers(run), loss_by_transformers(model)
    loss.backward()
    expected.backward()
    ours = {name: p.grad for name, p in canonical_parameters(run.modules).items() if p.grad is not None}
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    off = gradient_differences(ours, theirs)
    most = max(sorted(off), key=off.__getitem__)
    balance = 0.0
    if builder.balance is not None:
        mean = float(builder.balance.total) / builder.balance.count
        balance = relative(mean, float(balance_by_transformers(model)))
    untrained = tuple(sorted(ours.keys() ^ theirs.keys()))
    return Differences(relative(loss.item(), expected.item()), balance, off[most], most, untrained)
