"""Memory of a rank, predicted: what DeepSpeed 0.19.8, our loss and one-forward-one-backward hold, and when.

Bytes, pure arithmetic. Two moments can be a stage's fullest: a backward, when activations are held, and the optimizer's
step, which needs copies of its own; weights, gradients, masters and moments are there at both. What is not counted:
the device's context and communication library, fragments of its allocator, and checkpoints on their way to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fft.ops.cross_entropy import logit_bytes, piece_rows
from fft.ops.nf4 import packed_bytes

#: Elements of the bucket that DeepSpeed reduces gradients by (its default), where its ZeRO optimizer does not.
_BUCKET = 500_000_000
#: Elements of each of the two buckets that its ZeRO optimizer takes for a step's gradients, full or not: of fp32
#: weights, and of an optimizer in the machine's memory. By its default they would be 4 GB of a device.
ZERO_BUCKET = 50_000_000
_FP32 = _INT32 = 4


@dataclass(frozen=True)
class Taken:
    """Bytes of a micro-batch that a layer takes: ``states``, ``taps`` that travel beside them, and ``ints``.

    ``context`` is what the layers of its ``part`` of the model in a stage compute of the latter, once.
    """

    states: int
    taps: int
    ints: int
    part: str
    context: int

    @property
    def floats(self) -> int:
        """All that is sent as one, and has a gradient."""
        return self.states + self.taps


@dataclass(frozen=True)
class LayerMemory:
    """One pipeline layer on one rank: elements of parameters, bytes of activations for one micro-batch.

    ``saved`` is held from forward to backward; ``forward`` and ``backward`` are what those need besides at most.
    ``recomputes`` says whether the layer may be among those that ``--checkpoint_grad_interval`` runs again. Of the
    elements ``held``, ``trained`` (None: all) have gradients and optimizer state, ``matrices`` of these are of two
    dimensions or more, ``experts`` are some of the experts, which other ranks have the rest of. ``taken`` is what it
    takes (None: what layers of texts do). ``packed`` of the elements are in four bits.
    """

    held: int
    matrices: int
    saved: int
    forward: int
    backward: int
    recomputes: bool = False
    trained: int | None = None
    experts: int = 0
    taken: Taken | None = None
    packed: int = 0

    def in_four_bits(self, packed: int, largest: int) -> "LayerMemory":
        """With so many elements in four bits; matrices of up to ``largest`` bytes are multiplied out, one by one."""
        return replace(self, packed=packed, forward=self.forward + largest, backward=self.backward + largest)

    def without_gradients(self) -> "LayerMemory":
        """Where nothing is trained up to here, nothing is kept for a backward."""
        return replace(self, saved=0, forward=self.saved + self.forward, backward=0)


@dataclass(frozen=True)
class SharedTowerMemory:
    """A tower that every rank has, and the share of a step's images that a rank encodes, in bytes.

    ``layer`` has its parameters; it saves what is kept of these images while the pipeline runs, and needs the rest of
    its bytes before and after that. ``features`` are those of all images of a step, and their gradients, which the
    first stage has.
    """

    layer: LayerMemory
    features: int


@dataclass(frozen=True)
class Circumstances:
    """What the memory of all stages depends on. ``tokens`` are a rank's of a micro-batch, ``row`` is all of them.

    ``replicas`` share the optimizer's state (data x sequence), of experts every ``expert``-th; ``interval`` is
    ``--checkpoint_grad_interval``;
    ``itemsize`` 2 for bf16 and 4 for fp32; ``zero`` is ZeRO's stage; ``host`` is for a device that is the CPU;
    ``offload`` for an optimizer in the machine's memory; ``lowest`` is the first layer of which something is trained,
    ``embedding`` the one that looks ids up. ``tower`` is one that all stages share.
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
    embedding: int = 0
    tower: "SharedTowerMemory | None" = None

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of a micro-batch."""
        return self.tokens * self.hidden_size * self.itemsize

    def taken(self, layers: Sequence[LayerMemory], index: int) -> Taken:
        """What a layer takes: states, or ids; boundaries, of which positions, cosines and sines are made."""
        if (known := layers[index].taken) is not None:
            return known
        ints, turns = _INT32 * (self.row + 1), self.tokens * (8 + 2 * self.head_size * self.itemsize)
        if index == 0:
            return Taken(0, 0, ints + _INT32 * self.tokens, "decoder", turns)
        return Taken(self.hidden, 0, ints, "decoder", turns)


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
    twice: bool = False,
) -> LayerMemory:
    """The head with its loss (:mod:`fft.ops.cross_entropy`), ``vocabulary`` being the rows that this rank has.

    Gradients of the trained states and, where the head is ``trained``, of the weight, in fp32, are formed in the
    forward; the latter is ``summed`` where sums are, which are counted as such, or kept for backward. Beside them is a
    piece of logits. Of a ``normalized`` head there is a second one in forward, and in backward its gradient is divided
    and multiplied: five of its size at once.

    Where logits are made ``twice`` nothing but the states is kept for backward, and gradients are formed there.
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
    if twice:
        made = 2 * states + own * _FP32
        saved = states + (weight * itemsize if normalized else 0)
        forward = states + logits
        backward = max(made + logits, made + states + (own * itemsize if itemsize < _FP32 else 0))
        backward = max(backward, 4 * own * itemsize if normalized else 0)
    return LayerMemory(weight, own, saved, forward, backward, trained=own)


def stage_memory(layers: Sequence[LayerMemory], start: int, stop: int, stage: int, at: Circumstances) -> StageMemory:
    """Memory of a rank of pipeline ``stage`` that has layers ``start`` to ``stop`` of the model's ``layers``."""
    own = layers[start:stop]
    both_ends = at.tied and start <= at.embedding and stop == len(layers)  # a tied head is then the very embedding
    counted = [*(own[:-1] if both_ends else own), *([at.tower.layer] if at.tower is not None else [])]
    held = sum(layer.held for layer in counted)
    trained = sum(layer.held if layer.trained is None else layer.trained for layer in counted)
    matrices = sum(layer.matrices for layer in counted)
    packed = sum(layer.packed for layer in counted)
    weights = (held - packed) * at.itemsize + packed_bytes(packed)
    weights += trained * _FP32  # gradients are summed in fp32
    # Without ZeRO fp32 weights are their own masters.
    others = sum(layer.experts for layer in counted) * (at.expert - 1)  # what its expert group has besides
    shared = trained + others
    optimizer = shared * 3 * _FP32 // at.replicas if at.zero else trained * 2 * _FP32
    if stage == 0:  # what later stages receive has a gradient, whether anybody needs it or not
        own = [layer.without_gradients() if start + i < at.lowest else layer for i, layer in enumerate(own)]
    last = stop == len(layers)
    takes = [at.taken(layers, layer) for layer in range(start, stop if last else stop + 1)]
    peak = _passes(own, takes, stage, last, at)
    without = _passes(own[:-1], takes, stage, last, at) if last else peak
    if at.tower is not None:
        peak, without = (_with_tower(at.tower, bytes_, stage) for bytes_ in (peak, without))
    zero_fp32 = at.zero and at.itemsize == 4
    # The first bucket is there as soon as backward begins; of one on the host only what is used is memory.
    first_bucket = 0 if at.host or not (at.offload or zero_fp32) else _FP32 * ZERO_BUCKET
    if at.offload and not at.host:
        return StageMemory(weights, first_bucket, without, peak - without, _step_offload(counted, at))
    if at.offload:  # to where the weights are, too
        optimizer += _offloaded(counted, shared, at)
    step = _step_zero_fp32(trained, matrices + others, shared, at) if zero_fp32 else _step(trained, matrices, at)
    return StageMemory(weights, optimizer + first_bucket, without, peak - without, step)


def _step_offload(layers: Sequence[LayerMemory], at: Circumstances) -> int:
    """A bucket, by which gradients leave for the machine's memory, and a copy of the largest parameter at most."""
    largest = max(layer.matrices for layer in layers)
    return _FP32 * ZERO_BUCKET + largest * at.itemsize


def _offloaded(layers: Sequence[LayerMemory], shared: int, at: Circumstances) -> int:
    """Host memory besides masters and moments: gradients for the step, the stepped weights in their own type, and two
    buffers, through which the largest parameter's gradient goes.
    """
    largest = max(layer.matrices for layer in layers)
    return shared * (_FP32 + at.itemsize) // at.replicas + 2 * largest * at.itemsize


def _passes(own: Sequence[LayerMemory], takes: Sequence[Taken], stage: int, last: bool, at: Circumstances) -> int:
    """The most that forward and backward of micro-batches hold.

    ``takes`` is what the stage's layers take and, unless it is the ``last``, the one after them.
    """
    received, sent = takes[0].floats, at.hidden if last else takes[-1].floats
    in_flight = min(at.micro_batches, at.stages - stage)
    # Of a micro-batch: what is no state (boundaries, ids, ...) and the copy the forward gets, what is computed of it
    # (positions, cosines and sines), labels; what was received; what was sent, or what the loss was computed from.
    contexts = {taken.part: taken.context for taken in (takes if last else takes[:-1])}
    each = 2 * takes[0].ints + sum(contexts.values()) + (8 * at.tokens if last else 0) + received + sent
    buffers = (received if stage else 0) + (sent if not last else 0)  # of the two directions
    buffers += at.hidden if last and at.micro_batches > 1 else 0  # the last stage forgets its output one turn later
    segments = _segments(own, takes, at.interval)
    between = each + sum(taken if again else sum(x.saved for x in segment) for again, taken, segment in segments)
    others = (in_flight - 1) * between
    before, most = each, 0
    for again, taken, segment in segments:
        if again:
            # Forward keeps the segment's input and forgets the rest; backward runs it again, and then has all of it.
            before += taken
            most = max(most, before + taken + max(x.forward + x.saved for x in segment))
        kept = before
        for layer in segment:
            kept += layer.saved
            most = max(most, kept + layer.forward, kept + layer.backward)
        before = before if again else kept
    return buffers + others + most


def _with_tower(tower: SharedTowerMemory, passes: int, stage: int) -> int:
    """The most that is held while the pipeline passes, or before and after it, when the tower does."""
    kept = tower.layer.saved + (tower.features if stage == 0 else 0)
    return kept + max(passes, tower.layer.forward, tower.layer.backward)


def _segments(
    own: Sequence[LayerMemory], takes: Sequence[Taken], interval: int
) -> list[tuple[bool, int, Sequence[LayerMemory]]]:
    """The stage in segments of ``interval`` layers: whether it is run again, the bytes of its input, the layers.

    Only segments that have no other layers than a decoder's, or a tower's blocks, are run again.
    """
    if not interval:
        return [(False, 0, own)]
    segments = [(takes[i].states, own[i : i + interval]) for i in range(0, len(own), interval)]
    return [(all(layer.recomputes for layer in segment), states, segment) for states, segment in segments]


def _step(trained: int, matrices: int, at: Circumstances) -> int:
    """To be reduced, gradients are laid end to end in buckets; bf16's are, and go alone if they fill one."""
    if at.replicas == 1 or (at.itemsize == 2 and matrices > _BUCKET):
        return 0
    return _FP32 * min(trained, _BUCKET)


def _step_zero_fp32(trained: int, matrices: int, shared: int, at: Circumstances) -> int:
    """Besides the gradients counted already: they move to a bucket, from there to a copy of this rank's part, and that
    is copied flat for the optimizer. Of a bucket on the host only what is used is memory.
    """
    used = _FP32 * min(trained, ZERO_BUCKET)
    bucket = used if at.host else _FP32 * ZERO_BUCKET
    share = _FP32 * shared // at.replicas
    # Gradients that are another replica's to apply stay in the bucket; without any it is gone by the step.
    left = (bucket if at.replicas > 1 else 0) - _FP32 * trained
    return max(bucket - used + share, left + share + _FP32 * matrices // at.replicas)
