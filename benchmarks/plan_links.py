"""As a rank of several, on machines of their own: what links between them are measured to be, as JSON.

RANK=N WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m benchmarks.plan_links [LARGEST BYTES]
"""

import json
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

from fft.plan.link_rates import ExchangeTime, LinkTimes, link_times


def main() -> None:
    """Measure; the first rank prints."""
    dist.init_process_group("gloo")
    times = link_times(dist.group.WORLD, torch.device("cpu"), *map(int, sys.argv[1:]))
    if dist.get_rank() == 0:
        print(json.dumps(asdict(times)), flush=True)
    dist.destroy_process_group()


def read_times(said: dict) -> LinkTimes:
    """What :func:`main` printed."""
    kinds = (tuple(ExchangeTime(**one) for one in said[kind]) for kind in ("messages", "sums", "gathers"))
    return LinkTimes(said["ranks"], *kinds)


if __name__ == "__main__":
    main()
