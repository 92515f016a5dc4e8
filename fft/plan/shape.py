"""A model as matrix products and sizes: all that time depends on."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Product:
    """A weight [``out``, ``into``], which each token of a row is multiplied by ``uses`` times in the mean.

    Tensor-parallel ranks have a part of ``split``: "out" (columns of the product), "into" (rows), or "" (all have all).
    ``experts`` is how many weights of the kind there are, of which a token sees some.
    """

    out: int
    into: int
    split: str
    uses: float = 1.0
    experts: int = 1

    @property
    def parameters(self) -> int:
        """Of all experts."""
        return self.out * self.into * self.experts


@dataclass(frozen=True)
class Block:
    """A decoder layer, or half of one: its products, what its attention and its activation function see.

    ``qkv`` is the width of queries, keys and values together, 0 without attention; ``active`` that of the activation
    function's output, by token; ``gated`` whether it takes two inputs. ``window`` limits attention (None: it does not).
    """

    products: tuple[Product, ...]
    qkv: int
    active: float
    gated: bool
    norms: int
    window: int | None = None

    @cached_property
    def parameters(self) -> int:
        """Of its products."""
        return sum(product.parameters for product in self.products)


@dataclass(frozen=True)
class Shape:
    """``layers`` in their order; between embedding, and norm and head."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    layers: tuple[Block, ...]
    positions: int = 0

    @cached_property
    def parameters(self) -> int:
        """Of the model."""
        return sum(layer.parameters for layer in self.layers) + self.hidden * (
            self.vocab * (1 if self.tied else 2) + self.positions
        )


@dataclass(frozen=True)
class Sizes:
    """What is said of a decoder; ``experts`` of ``expert_ffn``, of which a token sees ``used``."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    gated: bool
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    window: int | None = None


def decoder(sizes: Sizes) -> Block:
    """A layer whose queries, keys and values are one product, as are gate and up."""
    q, kv = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    products = [Product(q + 2 * kv, sizes.hidden, "out"), Product(sizes.hidden, q, "into")]
    ffn, experts, uses = sizes.ffn, 1, 1.0
    if sizes.experts:
        ffn, experts, uses = sizes.expert_ffn, sizes.experts, float(sizes.used)
        products.append(Product(sizes.experts, sizes.hidden, ""))
    products.append(Product(ffn * (1 + sizes.gated), sizes.hidden, "out", uses, experts))
    products.append(Product(sizes.hidden, ffn, "into", uses, experts))
    return Block(tuple(products), q + 2 * kv, ffn * uses, sizes.gated, 2, sizes.window)
