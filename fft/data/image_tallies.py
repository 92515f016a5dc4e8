"""How many images a table's rows have, and how large these are: what tasks count, and the manifest keeps of it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fft.data.arrow_lists import INTS
from fft.data.known import GRIDS, IMAGES

_SUMS = ("images", "rows_with_images", "image_bytes", "patches", "patches_squared")
_SUM, _PER_ROW, _PATCHES = "vision ", "images per row ", "patches per row "


def tally_images(rows: pa.Table) -> Counter[str]:
    """The tallies of rows with images, and of no others."""
    if IMAGES not in rows.column_names:
        return Counter()
    grids = rows.column(GRIDS).combine_chunks().cast(INTS)
    tiles, high, wide = grids.flatten().to_numpy().astype(np.int64).reshape(-1, 3).T
    patches, counts = tiles * high * wide, grids.value_lengths().to_numpy() // 3
    of_rows = np.add.reduceat(np.append(patches, 0), np.cumsum(counts) - counts) * (counts > 0)
    sums = {
        "images": len(patches),
        "rows_with_images": int(np.count_nonzero(counts)),
        "image_bytes": pc.sum(pc.binary_length(pc.list_flatten(rows.column(IMAGES)))).as_py() or 0,
        "patches": int(patches.sum()),
        "patches_squared": int((patches * high * wide).sum()),
    }
    tallies = Counter({f"{_SUM}{name}": sums[name] for name in _SUMS})
    return tallies + _by_powers(_PER_ROW, counts) + _by_powers(_PATCHES, of_rows)


def image_tally_names() -> list[str]:
    """All names of such tallies."""
    powers = ["0", *(str(1 << exponent) for exponent in range(48))]
    return [*(f"{_SUM}{name}" for name in _SUMS), *(f"{p}{least}" for p in (_PER_ROW, _PATCHES) for least in powers)]


def image_facts(tallies: Mapping[str, int], merge: int) -> dict[str, Any]:
    """What a manifest counts of a table's images.

    ``patches_squared`` is the sum over tiles of the square of their patches, to which attention in a tower is
    proportional; the histograms map the fewest of a bin, 0 or a power of two, to rows.
    """
    sums = {name: tallies.get(f"{_SUM}{name}", 0) for name in _SUMS}
    facts = {**sums, "image_tokens": sums["patches"] // merge**2}
    return {**facts, "images_per_row": _bins(tallies, _PER_ROW), "patches_per_row": _bins(tallies, _PATCHES)}


def _by_powers(prefix: str, values: np.ndarray) -> Counter[str]:
    # frexp(n) = (m, e) with 2^(e-1) <= n < 2^e, exactly; of 0, e is 0.
    exponents, counts = np.unique(np.frexp(values)[1], return_counts=True)
    floors = (1 << int(e) - 1 if e else 0 for e in exponents)
    return Counter({f"{prefix}{least}": int(n) for least, n in zip(floors, counts, strict=True)})


def _bins(tallies: Mapping[str, int], prefix: str) -> dict[str, int]:
    found = ((int(name.removeprefix(prefix)), n) for name, n in tallies.items() if name.startswith(prefix))
    return {str(least): n for least, n in sorted(found)}
