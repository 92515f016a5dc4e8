"""Values that are no numbers any more, NaN or infinite, looked for in what is about to be written."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fft.parallel.groups import tell_all


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity. Each is read once, nothing is made of its size, and the host waits
    once for each device.
    """
    ends: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():  # types of 8 bits have no extremes
            # NaN is both the least and the largest of its tensor.
            ends[tensor.device][name] = torch.stack(torch.aminmax(tensor.detach())).isfinite().all()
    found = set()
    for own in ends.values():
        found |= {name for name, fine in zip(own, torch.stack([*own.values()]).tolist(), strict=True) if not fine}
    return [name for name in tensors if name in found]


def clause_on(names: Sequence[str]) -> str | None:
    """A clause on those that hold no numbers; None without any."""
    if not names:
        return None
    return f"{names[0]} holds NaN or infinity" + (f", as {len(names) - 1:,} more tensors do" if names[1:] else "")


def not_finite_anywhere(tensors: Mapping[str, Tensor], control: dist.ProcessGroup) -> str | None:
    """The same of what all ranks have, each its own ``tensors``, on all of them. Collective over ``control``, a group
    that sends host memory.
    """
    told = tell_all(not_finite(tensors), control)
    return clause_on([*dict.fromkeys(name for names in told for name in names)])
