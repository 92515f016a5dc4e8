"""Tensor parallelism with threads as ranks: outputs, gradients and seeds equal those of the whole model."""

import atexit
import itertools
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, VOCAB
from transformers import AutoConfig

from fft.data.draws import token_draws
from fft.models import small, supported
from fft.models.causal_lm import Ranks, StageBuilder
from fft.models.in_process import write_random_model
from fft.models.layers import canonical_parameters, pipeline_layers
from fft.models.lora import Lora
from fft.models.spec import ModelSpec
from fft.ops.cross_entropy import IGNORE, linear_cross_entropy
from fft.ops.fused import plain_ops
from fft.parallel.tensor import TensorParallel
from fft.planning.costs import layer_costs
from fft.train_arguments import LORA_MODULES
from fft.weights.hf import WeightReader

FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "pad_token_id": 60},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "intermediate_size": 61},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.5,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "router_aux_loss_coef": 0.5,
    },
    "qwen2-lora": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-lora": {"model_type": "qwen3", "head_dim": 16},
    "qwen2-dora": {"model_type": "qwen2", "tie_word_embeddings": True},
}
FAMILIES["qwen2-moe-lora"] = FAMILIES["qwen2-moe"]
#: All others that are trained.
OTHERS = {name: {"model_type": name, **small.TOKENS, **small.NEEDS.get(name, {})} for name in supported.FAMILIES}


@cache
def stored(family) -> WeightReader | None:
    """Weights of a family that has no first values of its own."""
    if family != "apertus":
        return None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write_random_model(AutoConfig.for_model(**{**SMALL, **OTHERS[family]}), folder, 0)
    return WeightReader(folder)


class ThreadRanks(TensorParallel):
    """Ranks that meet at a barrier in memory. A group is a list of ranks."""

    def __init__(self, rank, size, kv_heads, shared):
        self.rank, self.size, self._shared = rank, size, shared
        self.group = list(range(size))
        number = max(1, size // kv_heads)
        first = rank // number * number
        self.copies = list(range(first, first + number))

    def all_reduce(self, x, op=dist.ReduceOp.SUM, group=None):
        barrier, places = self._shared
        places[self.rank] = x.clone()
        barrier.wait(timeout=60)
        parts = torch.stack([places[rank] for rank in group or self.group])
        barrier.wait(timeout=60)
        return x.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))


def build(family, ranks, fused=None):
    """A rank's part of the model. Not in a thread: seeds are the process's."""
    config = AutoConfig.for_model(**{**SMALL, "head_dim": 8, **(FAMILIES | OTHERS)[family]})
    config._experts_implementation = "eager"  # the only one in float64
    lora = Lora(2, 8, tuple(LORA_MODULES.split(","))) if family.endswith(("-lora", "-dora")) else None
    if family.endswith("-dora"):
        lora = replace(lora, dropout=0.3, dora=True)
    builder = StageBuilder(
        ModelSpec(config, torch.float64, seed=5, fused=fused, lora=lora), Ranks(tensor=ranks), stored(family)
    )
    specs = pipeline_layers(builder)
    layers = [spec.build() for spec in specs[:-1]]
    for name, parameter in canonical_parameters(torch.nn.ModuleList(layers)).items():
        if name.endswith("lora_B.weight"):  # zeros, which would hide everything
            shard = builder.shards.get(name)
            shape = parameter.shape if shard is None else shard.shape
            values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
            parameter.detach().copy_(values if shard is None else shard.of(values))
    if builder.spec.tied:
        return builder, [*layers, lambda x: specs[-1].forward(layers[0], x)]
    return builder, [*layers, specs[-1].build()]


def run(builder, layers):
    """Loss, the experts' loss, and every parameter as (shard, value, gradient)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (1, 24), generator=generator, dtype=torch.int32)
    labels = torch.randint(VOCAB, (24,), generator=generator).masked_fill(torch.arange(24) % 5 == 0, IGNORE)
    activations = ids, torch.tensor([0, 9, 10, 24, *[24] * 21], dtype=torch.int32)
    if builder.spec.lora is not None and builder.spec.lora.dropout:
        activations = *activations, torch.from_numpy(token_draws(0, [3], [0], 24))
    if builder.balance is not None:
        builder.balance.start(1)
    for layer in layers:
        activations = layer(activations)
    hidden, weight, *bias = activations
    loss = linear_cross_entropy(hidden, weight, labels, builder.vocabulary, *bias)
    loss.backward()
    modules = torch.nn.ModuleList(layer for layer in layers if isinstance(layer, torch.nn.Module))
    known = {name: (builder.shards.get(name), p.detach(), p.grad) for name, p in canonical_parameters(modules).items()}
    return loss.item(), builder.balance and float(builder.balance.total), known


def test_ranks_whose_parts_differ_by_a_row_reduce_the_same_chunks(monkeypatch):
    """Of 101 rows one rank has 51: chunks of 100 logits would be of one token there, of two on the other."""
    loss, _, whole = run(*build("llama", None))
    monkeypatch.setattr("fft.ops.cross_entropy.PIECE", 100 * 8)
    shared = threading.Barrier(2), {}
    ranks = [ThreadRanks(rank, 2, SMALL["num_key_value_heads"], shared) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda parts: run(*parts), [build("llama", rank) for rank in ranks]))
    for ours, _, parts in results:
        assert ours == pytest.approx(loss, rel=1e-6)
        shard, _, grad = parts["lm_head.weight"]
        torch.testing.assert_close(grad, shard.of(whole["lm_head.weight"][2]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "size", "fused"),
    [
        *itertools.product(FAMILIES, [2, 4], [None]),
        *itertools.product(FAMILIES, [2], [plain_ops()]),
        *itertools.product(sorted(OTHERS.keys() - FAMILIES - {"qwen2_moe", "qwen3_moe"}), [2], [None]),
    ],
)
def test_parts_equal_the_whole(family, size, fused):
    loss, balance, whole = run(*build(family, None, fused))
    shared = threading.Barrier(size), {}
    ranks = [ThreadRanks(rank, size, SMALL["num_key_value_heads"], shared) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda parts: run(*parts), [build(family, rank, fused) for rank in ranks]))
    # Norms and a router's softmax are float32 whatever the model is.
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    counted = dict.fromkeys(whole, 0)
    for (ours, our_balance, parts), rank in zip(results, ranks, strict=True):
        assert ours == pytest.approx(loss, rel=tolerance["rtol"])
        assert our_balance == (balance and pytest.approx(balance, rel=1e-6))
        for name, (_, value, grad) in whole.items():
            shard, our_value, our_grad = parts[name]
            assert torch.equal(our_value, value if shard is None else shard.of(value)), name
            if grad is None:  # frozen
                assert our_grad is None, name
                continue
            expected = grad if shard is None else shard.of(grad)
            torch.testing.assert_close(our_grad, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
            if shard.copy == 0 if shard else rank.rank == 0:
                counted[name] += our_grad.numel()
    # What DeepSpeed's norm counts is every element once.
    assert counted == {name: 0 if grad is None else grad.numel() for name, (_, _, grad) in whole.items()}


def test_a_part_that_was_built_leaves_the_costs_of_the_whole_as_they_were():
    """FLOPs a token are reckoned once the stage is built."""
    builder, _ = build("qwen3-moe", ThreadRanks(0, 2, 2, None))
    assert layer_costs(builder.spec, 64) == layer_costs(replace(builder.spec), 64)
