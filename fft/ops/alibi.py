"""ALiBi (arXiv 2108.12409) on every attention kernel, in a ring and with Ulysses: as wider heads.

To a score is added slope * (key's position - query's). A softmax does not see what is added to all scores of a query,
so slope * key's position will do, and that is a product like any other: queries get columns with the slope, keys such
with their position, values zeros. In half precision a slope is two numbers and a position two, so that next to nothing
is rounded: of positions up to 65,536 each is exact.
"""

from functools import lru_cache

import torch
from torch import Tensor

#: Columns added to a head: NPUs want multiples of 16.
COLUMNS = 16
#: The longest document whose positions bf16 has exactly.
LONGEST = 1 << 16
_STEP = 256


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each of a model's ``heads``: powers of two, and where they are no power of two, some in between."""
    power = 1 << heads.bit_length() - 1
    between = (2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power))
    return (*(2.0 ** (-8 * (i + 1) / power) for i in range(power)), *between)


def widened(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slopes: tuple[float, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [tokens, heads, size + :data:`COLUMNS`] whose plain attention is theirs with ALiBi.

    ``positions`` [tokens] are those of keys in their documents, ``slopes`` the queries' heads'; ``scale`` multiplies
    scores. What is beyond ``size`` in the output is nothing.
    """
    queries = _columns(slopes, scale, q.dtype, q.device).expand(q.shape[0], -1, -1)
    high, low = positions // _STEP * _STEP, positions % _STEP
    keys = torch.stack([high, low, high, low], dim=-1).to(k.dtype)
    keys = torch.nn.functional.pad(keys, (0, COLUMNS - 4))[:, None].expand(-1, k.shape[1], -1)
    wide = torch.nn.functional.pad(v, (0, COLUMNS))
    return torch.cat([q, queries], dim=-1), torch.cat([k, keys], dim=-1), wide


@lru_cache(maxsize=8)
def _columns(slopes: tuple[float, ...], scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What heads' queries get [heads, columns]: the slope, divided by the scale, in two parts, each twice."""
    exact = torch.tensor(slopes, dtype=torch.float64) / scale
    first = exact.to(dtype)
    second = (exact - first.double()).to(dtype)
    parts = torch.stack([first, first, second, second], dim=-1)
    return torch.nn.functional.pad(parts, (0, COLUMNS - 4)).to(device)
