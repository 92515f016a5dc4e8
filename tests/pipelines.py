"""Pipeline layers in one process, and their gradients against those of transformers."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fft.models.causal_lm import StageBuilder
from fft.models.in_process import InProcess
from fft.models.layers import canonical_parameters


def build(made: StageBuilder, split: bool = False) -> tuple[nn.ModuleList, InProcess]:
    """Modules, and what runs them."""
    run = InProcess(made, split)
    return run.modules, run


def check_gradients(modules: nn.ModuleList, model: PreTrainedModel) -> None:
    """Every parameter of the pipeline's layers has the gradient that it has in transformers' model; none lacks."""
    ours = canonical_parameters(modules)
    theirs = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(ours) == set(theirs)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4, msg=name)
