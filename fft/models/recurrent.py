"""Linear attention of packed documents: the module runs once for each, so that no state goes from one to the next.

transformers' modules begin with an empty state and an empty convolution whenever they are called, on every device and
whichever kernel is installed; its boundaries for kernels (``cu_seq_lens_q``) are ignored where there is none.
"""

from itertools import pairwise
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fft.errors import UserError
from fft.ops.documents import Documents
from fft.ops.sequence_parallel import ShardedDocuments

#: What layers call the module, and what configs call such a layer.
_MODULE, KIND = "linear_attn", "linear_attention"


def separate_documents(model: nn.Module) -> None:
    """Let the linear attention of a model's layers take packed documents; parameters keep their names."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == _MODULE:
            module.forward = MethodType(_each, module)


def check_recurrent(config: PretrainedConfig, sequence: int) -> None:
    """Raise :class:`UserError` where a row of a model with such layers would be shared out over ``sequence`` ranks."""
    if sequence > 1 and KIND in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise UserError(
            f"--sequence_parallel_size {sequence}: model type {config.model_type!r} has linear attention, whose state "
            "goes through a document token by token: set it to 1 and raise --pipe_parallel_size instead."
        )


def _each(self: nn.Module, hidden_states: Tensor, documents: Documents | ShardedDocuments, **_: object) -> Tensor:
    """The module's own forward, document by document; ``hidden_states`` is [1, tokens, hidden size]."""
    row = documents.row if isinstance(documents, ShardedDocuments) else documents
    forward = type(self).forward
    return torch.cat([forward(self, hidden_states[:, a:b]) for a, b in pairwise(row.bounds)], dim=1)
