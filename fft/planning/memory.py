"""Memory of a rank, predicted: what DeepSpeed 0.19.8, our loss and one-forward-one-backward hold, and when.

Bytes, pure arithmetic. Two moments can be a stage's fullest: a backward, when activations are held, and the optimizer's
step, which needs copies of its own; weights, gradients, masters and moments are there at both. What is not counted:
the device's context and communication library, fragments of its allocator, and checkpoints on their way to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fft.ops.cross_entropy import logit_bytes, piece_rows

#: Elements of the bucket that DeepSpeed reduces gradients by (its default).
_BUCKET = 500_000_000
_FP32 = 4


@dataclass(frozen=True)
class LayerMemory:
    """One pipeline layer on one rank: elements of parameters, bytes of activations for one micro-batch.

    ``saved`` is held from forward to backward; ``forward`` and ``backward`` are what those need besides at most.
    ``recomputes`` says whether the layer may be among those that ``--checkpoint_grad_interval`` runs again. Of the
    elements ``held``, ``trained`` (None: all) have gradients and optimizer state, ``matrices`` of these are of two
    dimensions or more, ``experts`` are some of the experts, which other ranks have the rest of.
    """

    held: int
    matrices: int
    saved: int
    forward: int
    backward: int
    recomputes: bool = False
    trained: int | None = None
    experts: int = 0

    def without_gradients(self) -> "LayerMemory":
        """Where nothing is trained up to here, nothing is kept for a backward."""
        return replace(self, saved=0, forward=self.saved + self.forward, backward=0)


@dataclass(frozen=True)
class Circumstances:
    """What the memory of all stages depends on. ``tokens`` are a rank's of a micro-batch, ``row`` is all of them.

    ``replicas`` share the optimizer's state (data x sequence), of experts every ``expert``-th; ``interval`` is
    ``--checkpoint_grad_interval``;
    ``itemsize`` 2 for bf16 and 4 for fp32; ``zero`` is ZeRO's stage; ``host`` is for a device that is the CPU;
    ``offload`` for an optimizer in the machine's memory; ``lowest`` is the first layer of which something is trained.
    """

    stages: int
    micro_batches: int
    replicas: int
    tokens: int
    row: int
    hidden_size: int
    head_size: int
    itemsize: int
    interval: int = 0
    tied: bool = False
    zero: int = 1
    host: bool = False
    offload: bool = False
    lowest: int = 0
    expert: int = 1


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank. ``loss`` is what the loss adds to the fullest moment of forward and backward."""

    weights: int
    optimizer: int
    activations: int
    loss: int
    step: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.optimizer + max(self.activations + self.loss, self.step)


def loss_memory(
    tokens: int,
    hidden_size: int,
    vocabulary: int,
    itemsize: int,
    trained: bool = True,
    normalized: bool = False,
    summed: bool = False,
) -> LayerMemory:
    """The head with its loss (:mod:`fft.ops.cross_entropy`), ``vocabulary`` being the rows that this rank has.

    Gradients of the trained states and, where the head is ``trained``, of the weight, in fp32, are formed in the
    forward; the latter is ``summed`` where sums are, which are counted as such, or kept for backward. Beside them is a
    piece of logits. Of a ``normalized`` head there is a second one in forward, and in backward its gradient is divided
    and multiplied: five of its size at once.
    """
    states, weight = tokens * hidden_size * itemsize, vocabulary * hidden_size
    each = logit_bytes(itemsize)
    logits = min(tokens, piece_rows(vocabulary, each)) * vocabulary * each
    own = weight if trained else 0
    kept = 0 if summed and not normalized else own * _FP32
    saved, forward = states + kept, states + logits
    # Gradients become those of all tokens; the weight's goes on in its own type.
    backward = states + (own * itemsize if kept and itemsize < _FP32 else 0)
    if normalized:
        forward, backward = forward + weight * itemsize, max(backward, 5 * own * itemsize - kept)
    return LayerMemory(weight, own, saved, forward, backward, trained=own)


def stage_memory(layers: Sequence[LayerMemory], start: int, stop: int, stage: int, at: Circumstances) -> StageMemory:
    """Memory of a rank of pipeline ``stage`` that has layers ``start`` to ``stop`` of the model's ``layers``."""
    own = layers[start:stop]
    both_ends = at.tied and start == 0 and stop == len(layers)  # a tied head is then the very embedding
    counted = own[:-1] if both_ends else own
    held = sum(layer.held for layer in counted)
    trained = sum(layer.held if layer.trained is None else layer.trained for layer in counted)
    matrices = sum(layer.matrices for layer in counted)
    weights = held * at.itemsize + trained * _FP32  # gradients are summed in fp32
    # Without ZeRO fp32 weights are their own masters.
    others = sum(layer.experts for layer in counted) * (at.expert - 1)  # what its expert group has besides
    shared = trained + others
    optimizer = shared * 3 * _FP32 // at.replicas if at.zero else trained * 2 * _FP32
    if stage == 0:  # what later stages receive has a gradient, whether anybody needs it or not
        own = [layer.without_gradients() if start + i < at.lowest else layer for i, layer in enumerate(own)]
    last = stop == len(layers)
    peak = _passes(own, stage, last, at)
    without = _passes(own[:-1], stage, last, at) if last else peak
    if at.offload and not at.host:
        return StageMemory(weights, 0, without, peak - without, _step_offload(counted, at))
    if at.offload:  # to where the weights are, too
        optimizer += _offloaded(counted, shared, at)
    zero_fp32 = at.zero and at.itemsize == 4
    step = _step_zero_fp32(trained, matrices + others, shared, at) if zero_fp32 else _step(trained, matrices, at)
    return StageMemory(weights, optimizer, without, peak - without, step)


def _step_offload(layers: Sequence[LayerMemory], at: Circumstances) -> int:
    """A bucket, through which gradients leave for the machine's memory, and a copy of the largest parameter at most."""
    largest = max(layer.matrices for layer in layers)
    return _FP32 * _BUCKET + largest * at.itemsize


def _offloaded(layers: Sequence[LayerMemory], shared: int, at: Circumstances) -> int:
    """Host memory besides masters and moments: gradients for the step, the stepped weights in their own type, and two
    buffers, through which the largest parameter's gradient goes.
    """
    largest = max(layer.matrices for layer in layers)
    return shared * (_FP32 + at.itemsize) // at.replicas + 2 * largest * at.itemsize


def _passes(own: Sequence[LayerMemory], stage: int, last: bool, at: Circumstances) -> int:
    """The most that forward and backward of micro-batches hold."""
    hidden = at.tokens * at.hidden_size * at.itemsize
    in_flight = min(at.micro_batches, at.stages - stage)
    # Of a micro-batch: boundaries and the copy the forward gets, positions, cosines and sines; labels.
    each = 8 * (at.row + 1) + at.tokens * (8 + 2 * at.head_size * at.itemsize) + (8 * at.tokens if last else 0)
    each += 8 * at.tokens if stage == 0 else hidden  # ids twice, or what was received
    each += hidden  # what was sent, or what the loss was computed from
    buffers = (hidden if stage > 0 else 0) + (hidden if not last else 0)  # of the two directions
    buffers += hidden if last and at.micro_batches > 1 else 0  # the last stage forgets its output one turn later
    segments = _segments(own, at.interval)
    between = each + sum(hidden if again else sum(x.saved for x in segment) for again, segment in segments)
    others = (in_flight - 1) * between
    before, most = each, 0
    for again, segment in segments:
        if again:
            # Forward keeps the segment's input and forgets the rest; backward runs it again, and then has all of it.
            before += hidden
            most = max(most, before + hidden + max(x.forward + x.saved for x in segment))
        kept = before
        for layer in segment:
            kept += layer.saved
            most = max(most, kept + layer.forward, kept + layer.backward)
        before = before if again else kept
    return buffers + others + most


def _segments(own: Sequence[LayerMemory], interval: int) -> list[tuple[bool, Sequence[LayerMemory]]]:
    """The stage in segments of ``interval`` layers; only segments of decoder layers alone are run again."""
    if not interval:
        return [(False, own)]
    segments = [own[i : i + interval] for i in range(0, len(own), interval)]
    return [(all(layer.recomputes for layer in segment), segment) for segment in segments]


def _step(trained: int, matrices: int, at: Circumstances) -> int:
    """To be reduced, gradients are laid end to end in buckets; bf16's are, and go alone if they fill one."""
    if at.replicas == 1 or (at.itemsize == 2 and matrices > _BUCKET):
        return 0
    return _FP32 * min(trained, _BUCKET)


def _step_zero_fp32(trained: int, matrices: int, shared: int, at: Circumstances) -> int:
    """Besides the gradients counted already: they move to a bucket, from there to a copy of this rank's part, and that
    is copied flat for the optimizer. Of a bucket on the host only what is used is memory.
    """
    used = _FP32 * min(trained, _BUCKET)
    bucket = used if at.host else _FP32 * _BUCKET
    share = _FP32 * shared // at.replicas
    # Gradients that are another replica's to apply stay in the bucket; without any it is gone by the step.
    left = (bucket if at.replicas > 1 else 0) - _FP32 * trained
    return max(bucket - used + share, left + share + _FP32 * matrices // at.replicas)
