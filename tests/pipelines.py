"""A model directory in one process, by our pipeline layers and by transformers: their losses of the same documents."""

import itertools
import sys
from pathlib import Path

import torch
from conftest import VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fft.models.causal_lm import StageBuilder
from fft.models.layers import canonical_parameters, pipeline_layers
from fft.ops.cross_entropy import linear_cross_entropy

#: Documents end here; the last token of each predicts nothing.
BOUNDS = [0, 5, 6, 17]


def build(made: StageBuilder, split=False):
    """All layers in one process, a tied embedding once, as DeepSpeed builds them; returns (modules, run)."""
    modules, calls, tied = nn.ModuleList(), [], {}
    for layer in pipeline_layers(made, split):
        if layer.tied in tied:
            calls.append(lambda x, layer=layer: layer.forward(tied[layer.tied], x))
            continue
        modules.append(layer.build())
        calls.append(modules[-1])
        if layer.tied is not None:
            tied[layer.tied] = modules[-1]

    def run(ids: Tensor, bounds: list[int]):
        total = ids.shape[1]
        activations = (ids.int(), torch.tensor(bounds + [total] * (total + 1 - len(bounds)), dtype=torch.int32))
        for call in calls:
            activations = call(activations)
        return activations

    run.vocabulary = made.vocabulary
    return modules, run


def documents(vocabulary: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Token ids [1, 17] of three documents, and their labels."""
    ids = torch.randint(vocabulary, (1, BOUNDS[-1]), generator=torch.Generator().manual_seed(0))
    labels = ids[0].roll(-1)
    labels[[bound - 1 for bound in BOUNDS[1:]]] = -100
    return ids, labels


def loss_by_layers(run, vocabulary: int = VOCAB) -> Tensor:
    """Sum of the token losses of :func:`documents`, packed into a row; ``run`` is :func:`build`'s."""
    ids, labels = documents(vocabulary)
    hidden, weight, *bias = run(ids, BOUNDS)
    return linear_cross_entropy(hidden, weight, labels, run.vocabulary, *bias)


def loss_by_transformers(model: PreTrainedModel, vocabulary: int = VOCAB) -> Tensor:
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
    layers = [(torch.cat(logits),) for logits in zip(*seen, strict=True)]
    return torch.stack([measure(logits, model.num_experts, model.num_experts_per_tok) for logits in layers]).mean()


def loaded(directory: Path) -> PreTrainedModel:
    """What transformers makes of a directory, in fp32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def check_gradients(modules: nn.ModuleList, model: PreTrainedModel) -> None:
    """Every parameter of the pipeline's layers has the gradient that it has in transformers' model; none lacks."""
    ours = canonical_parameters(modules)
    theirs = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(ours) == set(theirs)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4, msg=name)
