"""What every rank of ``test_ring_ranks.py`` runs: the ring, and Ulysses before it, against one process.

Rank 0 prints a line of JSON for each case: the largest errors of the output and of the gradients over all ranks; how
errors in bf16 compare with one process's, and how many numbers change that belong to documents nobody touched.
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
from fft.ops.sequence_parallel import SequenceParallel
from fft.parallel.ring_plan import plan_shards

DOCUMENTS = {
    "one-token documents": [1] * 9 + [130, 1, 1],
    "longer than two ranks": [5, 190, 5],
    "boundaries on cuts": [16, 16, 32, 64],
    "not divisible by 2P": [41, 160],
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def row(lengths: list[int], dtype: torch.dtype) -> tuple[list[torch.Tensor], Documents]:
    """q, k, v and the output's gradient of a row, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(total, heads, 8) for heads in (8, 4, 4, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return inputs, Documents.of((0, *np.cumsum(lengths).tolist()))


def one_process(inputs: list[torch.Tensor], documents: Documents) -> list[torch.Tensor]:
    """Output and gradients of the whole row."""
    *leaves, dout = [x.clone() for x in inputs]
    out = packed_attention(*(x.requires_grad_() for x in leaves), documents, 0.3)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def this_rank(
    parallel: SequenceParallel, inputs: list[torch.Tensor], documents: Documents, recompute: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Which tokens this rank holds, and their output and gradients."""
    shards = plan_shards(documents.bounds, parallel.rings)
    mine = torch.from_numpy(parallel.tokens(shards))
    *own, dout = [x[mine] for x in inputs]
    own = [x.requires_grad_() for x in own]
    if recompute:
        out = checkpoint(lambda *x: parallel.attention(*x, shards, 0.3), *own, use_reentrant=False)
    else:
        out = parallel.attention(*own, shards, 0.3)
    out.backward(dout)
    return mine, [out.detach(), *(x.grad for x in own)]


def errors(parallel: SequenceParallel, lengths: list[int], dtype: torch.dtype, recompute: bool) -> torch.Tensor:
    """Largest differences of out, dq, dk, dv over all ranks from one process doing the whole row."""
    inputs, documents = row(lengths, dtype)
    mine, ours = this_rank(parallel, inputs, documents, recompute)
    pairs = zip(ours, one_process(inputs, documents), strict=True)
    worst = torch.tensor([float((a - b[mine]).abs().max()) for a, b in pairs])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst


def bf16_errors(parallel: SequenceParallel) -> torch.Tensor:
    """Errors of out, dq, dk, dv in bf16 against float64, as a part of those of one process in bf16."""
    inputs, documents = row([300, 48, 164], torch.bfloat16)
    exact, single = one_process([x.double() for x in inputs], documents), one_process(inputs, documents)
    mine, ours = this_rank(parallel, inputs, documents)
    squares = torch.tensor([float((a.double() - b[mine]).square().sum()) for a, b in zip(ours, exact, strict=True)])
    dist.all_reduce(squares)
    squares /= dist.get_world_size() / (parallel.degree * parallel.rings)  # groups that computed the same
    return squares.sqrt() / torch.tensor([float((a - b).norm()) for a, b in zip(single, exact, strict=True)])


def leaks(parallel: SequenceParallel) -> torch.Tensor:
    """Numbers of out, dq, dk, dv that change, bit for bit, with a document that they do not belong to."""
    inputs, documents = row([41, 30, 60], torch.float32)
    _, before = this_rank(parallel, inputs, documents)
    mine, after = this_rank(parallel, [torch.cat((x[:41], x[41:71] + 1, x[71:])) for x in inputs], documents)
    others = (mine < 41) | (mine >= 71)
    changed = torch.tensor([int((a[others] != b[others]).sum()) for a, b in zip(before, after, strict=True)])
    dist.all_reduce(changed)
    return changed


def refusal(parallel: SequenceParallel) -> str:
    """What is said of key/value heads that ``degree`` does not divide."""
    shards = plan_shards((0, 64), parallel.rings)
    tokens = len(parallel.tokens(shards))
    q, k = torch.zeros(tokens, 4 * parallel.degree, 8), torch.zeros(tokens, 1, 8)
    try:
        parallel.attention(q, k, k, shards, 0.3)
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
                worst = errors(parallel, lengths, dtype, recompute=name == "longer than two ranks")
                if dist.get_rank() == 0:
                    print(json.dumps({"degree": degree, "case": name, "dtype": kind, "errors": worst.tolist()}))
        ratios, changed = bf16_errors(parallel), leaks(parallel)
        if dist.get_rank() == 0:
            print(json.dumps({"degree": degree, "bf16": ratios.tolist(), "leaks": changed.tolist()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
