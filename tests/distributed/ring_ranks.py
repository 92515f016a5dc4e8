"""What every rank of ``test_ring_ranks.py`` runs: the ring, and Ulysses before it, against one process.

Rank 0 prints a line of JSON for each case: the largest errors of the output and of the gradients over all ranks.
"""

import json
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from fft.errors import UserError
from fft.ops.attention import packed_attention
from fft.ops.documents import Documents
from fft.ops.ring import SequenceParallel
from fft.parallel.ring_plan import plan_layout

DOCUMENTS = {
    "one-token documents": [1] * 9 + [130, 1, 1],
    "longer than two ranks": [5, 190, 5],
    "boundaries on cuts": [16, 16, 32, 64],
    "not divisible by 2P": [41, 160],
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def errors(parallel: SequenceParallel, lengths: list[int], dtype: torch.dtype, recompute: bool) -> list[float]:
    """Largest differences of out, dq, dk, dv on this rank from one process doing the whole row."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(total, heads, 8) for heads in (8, 4, 4, 8)]
    *inputs, dout = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    documents = Documents.of((0, *np.cumsum(lengths).tolist()))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = packed_attention(*leaves, documents, 0.3)
    expected.backward(dout)

    layout = plan_layout(documents.bounds, parallel.rings)
    mine = torch.from_numpy(parallel.tokens(layout))
    shards = [x[mine].requires_grad_() for x in inputs]
    if recompute:
        out = checkpoint(lambda *x: parallel.attention(*x, layout, 0.3), *shards, use_reentrant=False)
    else:
        out = parallel.attention(*shards, layout, 0.3)
    out.backward(dout[mine])
    pairs = [(out, expected), *zip((x.grad for x in shards), (x.grad for x in leaves), strict=True)]
    return [float((ours - theirs[mine]).detach().abs().max()) for ours, theirs in pairs]


def refusal(parallel: SequenceParallel) -> str:
    """What is said of key/value heads that ``degree`` does not divide."""
    layout = plan_layout((0, 64), parallel.rings)
    tokens = len(parallel.tokens(layout))
    q, k = torch.zeros(tokens, 4 * parallel.degree, 8), torch.zeros(tokens, 1, 8)
    try:
        parallel.attention(q, k, k, layout, 0.3)
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    """Run all cases on all Ulysses degrees given; with two groups, both at once."""
    degrees, group_size = json.loads(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    groups = [list(range(i, i + group_size)) for i in range(0, world, group_size)]
    for degree in degrees:
        parallel = SequenceParallel(groups, degree)
        if degree > 1 and dist.get_rank() == 0:
            print(json.dumps({"degree": degree, "refusal": refusal(parallel)}))
        for name, lengths in DOCUMENTS.items():
            for kind, dtype in DTYPES.items():
                worst = torch.tensor(errors(parallel, lengths, dtype, recompute=name == "longer than two ranks"))
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                if dist.get_rank() == 0:
                    print(json.dumps({"degree": degree, "case": name, "dtype": kind, "errors": worst.tolist()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
