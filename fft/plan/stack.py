"""What software does with a layout: facts about it, read in its source or its documentation, not fitted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """How a trainer computes and exchanges.

    ``attention`` is "flash" or "unfused" (``scores``, bytes that softmax moves of each in forward and backward);
    ``flash`` is what its kernel reaches of the one in the device's file. ``passes`` is how often elementwise operators
    move what is counted; ``fused_norms`` and ``fused_inner`` (activation function, rotary embedding) say that they are
    one kernel each. ``logits`` bytes that the loss moves a logit; ``gathered`` and ``reduced`` bytes a parameter that
    exchanges of weights and of gradients send. ``zero`` 0: all replicas step all; 1: each its share; 2: gradients are
    reduced layer by layer as well; 3: weights are gathered for each layer's forward and backward, too.
    ``overlapped``: gradients are reduced while backward runs. ``tensor_hidden`` is the share of tensor parallel
    exchanges that products hide, ``tensor_back`` how many a backward has for each of a forward. ``split_norms``: tensor
    ranks share out tokens between products (Megatron's sequence parallelism). ``blocking``: a send waits for the
    receiver, as in DeepSpeed's engine; ``paired``: what goes to a neighbour and what comes from it do so together.
    ``scattered``: gradients are added up on the rank alone that takes their step, by a reduce-scatter, or by
    "messages". ``wide_head``: the product that makes the head's gradient is one of 32 bits. ``logits_twice``: backward
    makes logits once more. ``numbers`` exchanges of a
    few bytes a step, for which all ranks wait: norms, losses, counts. ``step`` bytes that the optimizer moves a
    parameter that it has, ``accumulated`` those that summing gradients moves a parameter and micro-batch. ``dropout``
    is applied to states. ``rate`` is by how much products are faster than in 16 bits; ``host`` scales the time of
    launches.
    """

    attention: str = "flash"
    flash: float = 1.0
    scores: tuple[float, float] = (9.0, 11.0)
    passes: float = 1.0
    fused_norms: bool = True
    fused_inner: bool = True
    logits: float = 28.0
    gathered: float = 2.0
    reduced: float = 2.0
    zero: int = 1
    overlapped: bool = False
    tensor_hidden: float = 0.0
    tensor_back: float = 1.0
    split_norms: bool = False
    blocking: bool = False
    paired: bool = False
    scattered: bool | str = False
    wide_head: bool = False
    logits_twice: bool = False
    numbers: int = 0
    step: float = 40.0
    accumulated: float = 8.0
    dropout: bool = False
    rate: float = 1.0
    host: float = 1.0
