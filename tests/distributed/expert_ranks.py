"""What every rank of ``test_expert_ranks.py`` runs: experts spread over ranks, against one process that has all.

Rank 0 prints a line of JSON for each case: the largest relative difference of outputs and of gradients over all ranks,
and how often they exchanged something in forward and backward.
"""

import copy
import itertools
import json
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fft.models.recompute import kept_of, selective
from fft.ops.experts import asks_interface, spread_all
from fft.parallel.expert import ExpertParallel
from fft.parallel.mesh import MeshSizes
from fft.parallel.tensor_plan import expert_shard

#: Families whose experts differ: gate and up, transposed and with biases, none but up.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")
#: Tokens of the ranks: uneven; none on one rank.
TOKENS = {"uneven": (7, 16, 1, 30), "one rank has none": (9, 0, 5, 3)}
EXPERTS, TOP_K, HIDDEN = 8, 3, 32
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), HIDDEN),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
}


def experts_of(family: str, implementation: str) -> nn.Module:
    """Experts of a family in random weights, the same on all ranks; in float64 where they are computed one by one."""
    config = AutoConfig.for_model(family, **SIZES, vocab_size=64, num_attention_heads=2, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    module = next(filter(asks_interface, model.modules()))
    module.to_empty(device="cpu").to(torch.float64 if implementation == "eager" else torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def own_part(whole: nn.Module, ranks: ExpertParallel) -> nn.Module:
    """What this rank has of experts."""
    module = copy.deepcopy(whole, {id(whole.config): whole.config})
    for name, parameter in whole.named_parameters():
        shard = expert_shard(tuple(parameter.shape), ranks.rank, ranks.size)
        setattr(module, name, nn.Parameter(shard.of(parameter.detach()).clone()))
    spread_all(module, ranks)
    return module


def run(module: nn.Module, inputs: list[torch.Tensor], grad: torch.Tensor, recompute: bool) -> list[torch.Tensor]:
    """Output, and gradients of hidden states and weights."""
    hidden, chosen, weights = inputs
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    again = partial(selective, module, kept=kept_of(nn.ModuleDict({"experts": module}))) if recompute else module
    output = again(hidden, chosen, weights)
    output.backward(grad)
    return [output.detach(), hidden.grad, weights.grad]


def compare(whole: nn.Module, ranks: ExpertParallel, tokens: tuple[int, ...], chosen_of: int, recompute: bool) -> dict:
    """Errors and exchanges where tokens choose among the last ``chosen_of`` experts."""
    tokens, dtype = tokens[: ranks.size], whole.down_proj.dtype
    generator = torch.Generator().manual_seed(1)
    hidden, grad = (torch.randn(sum(tokens), HIDDEN, generator=generator).to(dtype) for _ in range(2))
    scores = torch.rand(sum(tokens), chosen_of, generator=generator)
    chosen = scores.topk(min(TOP_K, chosen_of)).indices + EXPERTS - chosen_of
    inputs = [hidden, chosen, torch.rand(chosen.shape, generator=generator).to(dtype)]
    whole.zero_grad()
    expected, own = run(whole, inputs, grad, recompute=False), own_part(whole, ranks)
    start = sum(tokens[: ranks.rank])
    mine = slice(start, start + tokens[ranks.rank])
    before = ranks.group._get_sequence_number_for_group()
    found = run(own, [x[mine] for x in inputs], grad[mine], recompute)
    exchanges = ranks.group._get_sequence_number_for_group() - before
    pairs = [(a, b[mine], b) for a, b in zip(found, expected, strict=True)]
    for name, parameter in whole.named_parameters():
        shard = expert_shard(tuple(parameter.shape), ranks.rank, ranks.size)
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pairs.append((own.get_parameter(name).grad, shard.of(theirs), theirs))
    worst = [max(relative(*pair) for pair in pairs), float(exchanges)]
    values = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return {"error": values[0].item(), "exchanges": int(values[1])}


def relative(ours: torch.Tensor, theirs: torch.Tensor, whole: torch.Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((ours - theirs).abs().max() / whole.abs().max()) if ours.numel() else 0.0


def main() -> None:
    """All cases, on all ranks together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = ExpertParallel(MeshSizes(dist.get_world_size(), 1, expert=dist.get_world_size()))
    for family, implementation in itertools.product(FAMILIES, ("eager", "grouped_mm")):
        whole = experts_of(family, implementation)
        cases = itertools.product(TOKENS, (EXPERTS, 1), (False, True))  # or all to the last rank's last expert
        for tokens, chosen_of, recompute in cases:
            found = compare(whole, ranks, TOKENS[tokens], chosen_of, recompute)
            about = {"family": family, "experts": implementation, "tokens": tokens, "chosen of": chosen_of}
            if dist.get_rank() == 0:
                print(json.dumps(about | {"recompute": recompute} | found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
