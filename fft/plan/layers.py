"""How long the layers of a run take a rank for one micro-batch, and with what."""

from dataclasses import dataclass, fields

from fft.plan.exchanges import all_to_all_time, gather_time, group_of, reduce_time, send_time
from fft.plan.kernels import chain_time, flash_time, moving_time, product_time
from fft.plan.run import PlannedRun
from fft.plan.shape import Block, Product

_BF16 = 2
#: Bytes that a token moves in forward and backward, by whether operators are fused: a norm with the residual after it,
#: for each of the hidden size; an activation function, by whether it is gated, for each of its outputs; rotary
#: embedding and transposes, for each of queries, keys and values. Counted on the meta device (docs/layouts.md).
_NORM = {True: (10, 16), False: (44, 85)}
_INNER = {(True, True): (6, 10), (True, False): (4, 6), (False, True): (10, 18), (False, False): (4, 6)}
_TURN = {True: (4, 4), False: (20, 36)}


@dataclass(frozen=True)
class Parts:
    """Seconds of a pass: kernels, and exchanges that nothing hides; ``hidden`` are those that others hide."""

    products: float = 0.0
    attention: float = 0.0
    others: float = 0.0
    tensor: float = 0.0
    sequence: float = 0.0
    experts: float = 0.0
    weights: float = 0.0
    waiting: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "hidden")

    @property
    def kernels(self) -> float:
        """Of the device's own work."""
        return self.products + self.attention + self.others

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, factor: float) -> "Parts":
        """As often."""
        return Parts(*(getattr(self, field.name) * factor for field in fields(self)))


@dataclass(frozen=True)
class PassTimes:
    """A layer's forward and backward, what is computed again counted to the latter."""

    forward: Parts
    backward: Parts

    def __add__(self, other: "PassTimes") -> "PassTimes":
        return PassTimes(self.forward + other.forward, self.backward + other.backward)


def block_times(run: PlannedRun, block: Block) -> PassTimes:
    """Of a decoder layer, or a half of one."""
    products = _products(run, block)
    attention = _attention(run, block) if block.qkv else (0.0, 0.0)
    others = _others(run, block)
    tensor = _tensor(run, block)
    sequence, hidden = _sequence(run, block, attention) if block.qkv else ((0.0, 0.0), (0.0, 0.0))
    experts = _experts(run, block)
    again, seen = run.again, 1 - run.stack.tensor_hidden
    forward = Parts(
        products, attention[0], others[0], tensor * seen, sequence[0], experts, hidden=hidden[0] + tensor * (1 - seen)
    )
    backward = Parts(
        products * (2 + again.products),
        attention[1] + attention[0] * again.attention,
        others[1] + others[0] * again.others,
        tensor * seen * (run.stack.tensor_back + again.exchanges),
        sequence[1] + sequence[0] * again.exchanges,
        experts * (1 + again.exchanges),
        hidden=hidden[1] + tensor * (1 - seen),
    )
    return _with_weights(run, block, _not_ahead(run, forward, 1.0), _not_ahead(run, backward, 1.3 + again.products))


def _not_ahead(run: PlannedRun, parts: Parts, launches: float) -> Parts:
    """A device waits for a host that launches more slowly than it computes; one that is the host does both in turn."""
    lacking = run.at.host * run.stack.host * launches - (0.0 if run.machine.device.cpu else parts.seconds)
    return parts + Parts(waiting=lacking) if lacking > 0 else parts


def _products(run: PlannedRun, block: Block) -> float:
    """Seconds of the products of a forward; those of a backward are twice as many, of the same sizes."""
    return sum(_product(run, product) for product in block.products)


def _product(run: PlannedRun, product: Product) -> float:
    device, tensor = run.machine.device, run.sides.tensor
    out = product.out / (tensor if product.split == "out" else 1)
    into = product.into / (tensor if product.split == "into" else 1)
    own = product.experts / run.sides.expert if product.experts > 1 else 1
    rows = run.tokens * product.uses
    if product.experts > 1:  # one grouped launch, each expert's rows by themselves
        each = product_time(device, rows / own, out, into, run.at) - run.at.launch
        return (each * own + run.at.launch) / run.stack.rate
    return product_time(device, rows, out, into, run.at) / run.stack.rate


def _attention(run: PlannedRun, block: Block) -> tuple[float, float]:
    heads = run.shape.heads / run.sides.tensor
    seen = min(block.window or run.document, run.document)
    pairs = run.tokens * (seen - seen * seen / (2 * run.document))  # of a query and a key that it sees
    device = run.machine.device
    if run.stack.attention == "unfused":
        scores = run.tokens * run.document * heads
        width = run.shape.head_size
        each = product_time(device, run.document, run.document, width, run.at) - run.at.launch
        both = 2 * each * run.tokens / run.document * heads + 2 * run.at.launch
        forward, backward = run.stack.scores
        return (
            both + chain_time(device, scores * forward, 2, run.at),
            2 * both + chain_time(device, scores * backward, 2, run.at),
        )
    flops = 4 * pairs * heads * run.shape.head_size
    rates = device.flash[0] * run.stack.flash, device.flash[1] * run.stack.flash
    return flash_time(device, flops, seen, rates, run.at)


def _others(run: PlannedRun, block: Block) -> tuple[float, float]:
    """Norms, residuals, rotary embeddings, activation functions, and sums of weights' gradients."""
    stack, tensor, device = run.stack, run.sides.tensor, run.machine.device
    outside = block.norms * run.shape.hidden / (tensor if stack.split_norms else 1)
    active, turned = block.active / tensor, block.qkv / tensor
    drop = 2 if stack.dropout else 0
    norm, inner = _NORM[stack.fused_norms], _INNER[stack.fused_inner, block.gated]
    passes = []
    for back in (False, True):
        moved = outside * (norm[back] + drop) + active * inner[back] + turned * _TURN[stack.fused_inner][back]
        launches = (2 if stack.fused_norms else 9) * block.norms + (4 if stack.fused_inner else 14)
        sums = stack.accumulated * block.parameters / tensor if back else 0.0
        chain = chain_time(device, run.tokens * moved * stack.passes, launches * (1 + back), run.at)
        passes.append(chain + moving_time(device, sums, 0, run.at))
    return passes[0], passes[1]


def _tensor(run: PlannedRun, block: Block) -> float:
    """All-reduces of a forward, one for each product that is split by its rows; a backward has as many."""
    if run.sides.tensor == 1:
        return 0.0
    sums = sum(product.split == "into" for product in block.products)
    states = run.tokens * run.shape.hidden * _BF16
    return sums * reduce_time(run.machine, run.tensor_group, states, run.at)


def _sequence(
    run: PlannedRun, block: Block, attention: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Exchanges of forward and backward between ranks that share a row, seen and hidden."""
    sides = run.sides
    if sides.sequence == 1:
        return (0.0, 0.0), (0.0, 0.0)
    width = run.shape.head_size / sides.tensor
    q, kv = run.shape.heads * width, run.shape.kv_heads * width
    heads = group_of(run.machine, sides.ulysses, sides.tensor)
    spread = all_to_all_time(run.machine, heads, run.tokens * (2 * q + 2 * kv) * _BF16, run.at)
    rings = sides.sequence // sides.ulysses
    if rings == 1:
        return (spread, spread), (0.0, 0.0)
    states = run.tokens * 2 * kv  # of keys and values; those of all ranks of a Ulysses group, heads shared
    seen, hidden = [], []
    for size, kernels in ((_BF16, attention[0]), (_BF16 + 4, attention[1])):
        hop = send_time(run.machine, states * size, sides.tensor * sides.ulysses, run.at)
        whole, behind = (rings - 1) * hop, (rings - 1) * min(hop, kernels / rings)
        seen.append(spread + whole - behind + run.at.beside * behind)
        hidden.append(behind)
    return (seen[0], seen[1]), (hidden[0], hidden[1])


def _experts(run: PlannedRun, block: Block) -> float:
    """Rows to the ranks of their experts, and back."""
    if run.sides.expert == 1:
        return 0.0
    used = max((product.uses for product in block.products if product.experts > 1), default=0.0)
    group = group_of(run.machine, run.sides.expert, run.sides.tensor)
    return 2 * all_to_all_time(run.machine, group, run.tokens * used * run.shape.hidden * _BF16, run.at)


def _with_weights(run: PlannedRun, block: Block, forward: Parts, backward: Parts) -> PassTimes:
    """What gathering a layer's weights adds, where replicas share them out; kernels hide it as far as they last."""
    if run.stack.zero < 2 or run.replica_group.size == 1:
        return PassTimes(forward, backward)
    held = block.parameters / run.sides.tensor
    gather = (
        gather_time(run.machine, run.replica_group, held * run.stack.gathered, run.at) if run.stack.zero == 3 else 0
    )
    reduce = gather_time(run.machine, run.replica_group, held * run.stack.reduced, run.at)
    return PassTimes(_hidden(run, forward, gather), _hidden(run, backward, gather + reduce))


def _hidden(run: PlannedRun, parts: Parts, exchange: float) -> Parts:
    behind = min(exchange, parts.seconds)
    return parts + Parts(weights=exchange - behind + run.at.beside * behind, hidden=behind)


def embedding_times(run: PlannedRun) -> PassTimes:
    """Rows looked up, their gradients added; summed over tensor ranks that share the vocabulary."""
    states = run.tokens * run.shape.hidden * _BF16
    moved = chain_time(run.machine.device, 2 * states, 2, run.at)
    summed = reduce_time(run.machine, run.tensor_group, states, run.at)
    return PassTimes(Parts(others=moved, tensor=summed), Parts(others=3 * moved))


def head_times(run: PlannedRun) -> PassTimes:
    """The last norm, the head, the loss."""
    tokens, hidden = run.tokens, run.shape.hidden
    device, vocab = run.machine.device, run.shape.vocab / run.sides.tensor
    product = product_time(device, tokens, vocab, hidden, run.at) / run.stack.rate
    weights = product_time(device, vocab, hidden, tokens, run.at, wide=True) if run.stack.wide_head else product
    loss = chain_time(device, tokens * vocab * run.stack.logits, 10, run.at)
    norm = chain_time(device, tokens * hidden * 10, 2, run.at)
    sums = moving_time(device, vocab * hidden * run.stack.accumulated, 1, run.at)
    states = reduce_time(run.machine, run.tensor_group, tokens * hidden * _BF16, run.at)
    scalars = reduce_time(run.machine, run.tensor_group, tokens * 12, run.at)
    again = (product, 0.6 * loss) if run.stack.logits_twice else (0.0, 0.0)
    return _with_weights(
        run,
        Block((Product(run.shape.vocab, hidden, "out"),), 0, 0.0, False, 1),
        Parts(product, others=0.6 * loss + norm, tensor=scalars),
        Parts(product + weights + again[0], others=0.4 * loss + 2 * norm + sums + again[1], tensor=states),
    )
