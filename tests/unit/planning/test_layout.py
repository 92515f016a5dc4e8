"""Layouts planned without ranks: what layers hold, what stages need, what a dry run prints and refuses."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch.nn.functional import normalize
from transformers import AutoConfig

from fft.arguments import parse_arguments
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.layers import DecoderLayer, Positions
from fft.models.spec import ModelSpec
from fft.ops.cross_entropy import HeadSum, Targets, linear_cross_entropy, token_log_probs
from fft.parallel.mesh import mesh_sizes
from fft.planning.activations import Alive, add_to_sum, layer_activations
from fft.planning.costs import layer_costs, multiply_adds
from fft.planning.dry_run import check_fits, dry_run, seen_images
from fft.planning.layout import bubble_of, describe, plan_layout
from fft.planning.memory import ZERO_BUCKET, Circumstances, LayerMemory, loss_memory, stage_memory
from fft.planning.preflight import lay_out

CONF = Path(__file__).resolve().parents[3] / "conf"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def spec(model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> ModelSpec:
    return ModelSpec(AutoConfig.for_model(**(SMALL | {"model_type": model_type} | changes)), dtype)


@functools.cache
def known(model: str) -> ModelSpec:
    return ModelSpec(lay_out(parse_arguments(["--dry_run", "--model", model]), 1)[0], torch.bfloat16)


def dry(*flags: str) -> tuple:
    args = parse_arguments(["--dry_run", *flags])
    config, mesh = lay_out(args, args.ranks)
    images, load = seen_images(args, config)
    made = known(args.model) if images is None else replace(known(args.model), images=images)
    return args, config.model_type, plan_layout(args, made, mesh, host=False, load=load)


@pytest.mark.parametrize("file", sorted(CONF.glob("*b-*.yaml")), ids=lambda file: file.stem)
def test_settings_fit_their_devices(file, monkeypatch):
    monkeypatch.chdir(CONF.parent)
    args, name, layout = dry("--config", str(file))
    check_fits(layout, args.device_memory)
    assert layout.mesh.world == args.ranks
    assert args.ranks % 8 == 0
    assert layout.mesh.tensor <= 8  # of one node
    size = float(file.stem.partition("b-")[0])
    assert sum(cost.parameters for cost in layout.costs) / 1e9 == pytest.approx(size, rel=0.1)
    text = describe(args, name, layout)
    tokens = layout.mesh.data * args.gradient_accumulation_steps * args.seq_len
    bubble = bubble_of(args, layout)
    assert bubble > (layout.mesh.pipe - 1) / (args.gradient_accumulation_steps + layout.mesh.pipe - 1)
    assert f"{tokens:,} tokens" in text
    assert f"bubble {bubble:.1%}" in text
    assert f"{tokens:,} tokens a step; bubble {bubble:.1%}" in file.read_text()  # what its comment says


def test_a_million_tokens_over_32_ranks():
    flags = ("--model", str(CONF / "models/qwen2.5-7b.json"), "--checkpoint_grad_interval", "1")
    ring = ("--sequence_parallel_size", "32", "--seq_len", str(1 << 20), "--ranks", "32")
    (_, _, short), (_, _, long) = dry(*flags, "--ranks", "1", "--seq_len", str(1 << 15)), dry(*flags, *ring)
    # The same number of tokens a rank; besides those only the boundaries of the whole row and the ring's messages.
    assert long.memory[0].activations == pytest.approx(short.memory[0].activations, rel=0.05)
    assert long.memory[0].optimizer == pytest.approx(short.memory[0].optimizer / 32, rel=1e-6)


def test_a_stage_that_does_not_fit_is_named(capsys):
    flags = ("--dry_run", "--ranks", "2", "--model", str(CONF / "models/llama-3m.json"), "--pipe_parallel_size", "2")
    assert dry_run(parse_arguments([*flags, "--device_memory", "80"])) == 0
    assert "stage 1  1" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"stage [01] needs .* GB a rank, more than --device_memory 0.01") as refused:
        dry_run(parse_arguments([*flags, "--device_memory", "0.01"]))
    assert refused.value.exit_code == 1


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_every_parameter_is_held_by_some_rank(kind, tensor, split):
    made = spec(kind, vocab_size=96, **(EXPERTS if kind.endswith("moe") else {}))
    costs = layer_costs(made, 64, split, tensor)
    # Vectors are held by all ranks, matrices (but routers) by one.
    routers = sum(p.numel() for name, p in made.skeleton.named_parameters() if name.endswith("mlp.gate.weight"))
    matrices = sum(p.numel() for p in made.skeleton.parameters() if p.ndim > 1) - routers
    assert sum(c.parameters for c in costs) == sum(p.numel() for p in made.skeleton.parameters())
    assert sum(c.matrices for c in costs) == matrices // tensor + routers
    assert sum(c.held for c in costs) == sum(c.parameters for c in costs) - matrices + matrices // tensor


def test_experts_over_ranks_are_held_by_one_of_them():
    made = spec("qwen3_moe", torch.bfloat16, **EXPERTS)
    experts = sum(p.numel() for name, p in made.skeleton.named_parameters() if ".experts." in name)
    whole, half = layer_costs(made, 64), layer_costs(made, 64, expert=2)
    assert sum(c.held for c in whole) - sum(c.held for c in half) == sum(c.experts for c in half) == experts // 2
    assert [c.flops for c in whole] == [c.flops for c in half]
    args = parse_arguments(["--dry_run", "--model", "m", "--seq_len", "64", "--dtype", "bf16"])
    one, two = (plan_layout(args, made, mesh_sizes(4, 1, 1, 1, size), host=False) for size in (1, 2))
    assert one.memory[0].optimizer == two.memory[0].optimizer  # shared out over all replicas, either way
    assert one.memory[0].weights - two.memory[0].weights == experts // 2 * (2 + 4)
    assert "tensor 1, experts over 2" in describe(args, "qwen3_moe", two)
    with pytest.raises(UserError, match="--expert_parallel_size 2: the experts of a llama are computed in a way"):
        plan_layout(args, spec(), mesh_sizes(4, 1, 1, 1, 2), host=False)


def test_a_token_costs_the_experts_it_is_sent_to():
    dense, sparse = (
        layer_costs(spec("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[1]), 64)[i]
        for i in (2, 1)
    )
    hidden, attention = 32, 64 * 32
    assert dense.flops - sparse.flops == 3 * hidden * (64 - 2 * 16 - 24) - hidden * (8 + 1)
    assert dense.flops - dense.parameters == attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype):
    made = spec(dtype=dtype, hidden_size=64, head_dim=16)
    planned = layer_activations(made, tokens=48)
    builder = StageBuilder(made)
    real = DecoderLayer(builder, 0, Positions(builder))
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, 48, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = real((hidden, torch.tensor([0] + [48] * 48, dtype=torch.int32)))[0]
    rotary = 2 * 48 * 16 * dtype.itemsize  # counted with the micro-batch
    assert output.requires_grad
    assert sum(kept.values()) - rotary == planned[1].saved


def test_an_early_stage_holds_more_and_recomputing_holds_less():
    layers = [LayerMemory(1000, 1000, 10_000, 500, 900, True)] * 8
    layers += [loss_memory(tokens=10, hidden_size=4, vocabulary=100, itemsize=4)]
    at = Circumstances(4, 8, 1, tokens=10, row=10, hidden_size=4, head_size=2, itemsize=4)
    kept = [stage_memory(layers, a, b, stage, at) for stage, (a, b) in enumerate(itertools.pairwise((0, 2, 4, 6, 9)))]
    held = [memory.activations for memory in kept]
    each = 8 * 11 + 10 * (8 + 2 * 2 * 4) + 160 + 160
    assert held == sorted(held, reverse=True)
    assert held[1] == pytest.approx(2 * 160 + 2 * (20_000 + each) + each + 20_000 + 900)
    again = Circumstances(4, 8, 1, tokens=10, row=10, hidden_size=4, head_size=2, itemsize=4, interval=1)
    assert stage_memory(layers, 0, 2, 0, again).activations < held[0] / 4
    assert kept[3].loss > 0
    assert kept[0].loss == 0
    assert kept[0].weights == 2 * 1000 * 8
    assert kept[0].optimizer == 2 * 1000 * 12 + 4 * ZERO_BUCKET  # on a device, which has the bucket whole


def test_equal_memory_gives_early_stages_fewer_layers():
    flags = ("--model", str(CONF / "models/qwen2.5-7b.json"), "--pipe_parallel_size", "4", "--ranks", "4")
    more = ("--gradient_accumulation_steps", "8", "--seq_len", "4096")
    most = {}
    for method in ("fast", "mem"):
        _, _, layout = dry(*flags, *more, "--partition_method", method)
        most[method] = max(memory.total for memory in layout.memory)
        sizes = [b - a for a, b in itertools.pairwise(layout.bounds)]
    assert most["mem"] < 0.9 * most["fast"]
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(("itemsize", "replicas"), [(2, 1), (4, 1), (2, 2)])
def test_an_offloaded_optimizer_lies_where_the_weights_do_on_a_host(itemsize, replicas):
    """Counted in a run on a CPU: another 4 bytes a parameter and its own size, and twice the largest gradient."""
    layers = [LayerMemory(held, held, 1, 0, 0) for held in (100, 40, 60)]
    on = {"tokens": 1, "row": 1, "hidden_size": 1, "head_size": 2, "itemsize": itemsize, "host": True}
    plain, offloaded = (
        stage_memory(layers, 0, 3, 0, Circumstances(1, 1, replicas, **on, offload=offload)) for offload in (False, True)
    )
    assert offloaded.optimizer - plain.optimizer == 200 * (4 + itemsize) // replicas + 2 * 100 * itemsize
    assert offloaded.weights == plain.weights


@pytest.mark.parametrize(
    ("flags", "smaller", "said"),
    [
        (("--lora_dim", "16"), ("weights", "optimizer"), "adapters trained"),
        (("--freeze", "embed_tokens,lm_head,layers"), ("weights", "optimizer"), "all but embed_tokens,lm_head,layers"),
        (("--offload_optimizer",), ("optimizer",), "all parameters trained, the optimizer's in the machine's memory"),
    ],
)
def test_the_table_is_of_what_is_trained(flags, smaller, said):
    base = ("--model", str(CONF / "models/qwen2.5-14b.json"), "--ranks", "2", "--seq_len", "2048")
    (_, _, every), (args, name, some) = dry(*base), dry(*base, *flags)
    for part in smaller:
        assert getattr(some.memory[0], part) < 0.5 * getattr(every.memory[0], part) + 1
    assert some.memory[0].activations <= every.memory[0].activations
    assert said in describe(args, name, some)


def test_adapters_of_a_model_fit_where_the_model_does_not():
    """29.5 GB of weights and little else, which the gradients and masters of all of them made 240."""
    flags = ("--model", str(CONF / "models/qwen2.5-14b.json"), "--ranks", "1", "--checkpoint_grad_interval", "1")
    with pytest.raises(UserError, match=r"needs 2\d\d.* GB a rank"):
        check_fits(dry(*flags)[2], 80)
    layout = dry(*flags, "--lora_dim", "16")[2]
    check_fits(layout, 80)
    parameters = 16 * 48 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 13824))
    assert sum(cost.trained for cost in layout.costs) == parameters
    assert layout.memory[0].optimizer == 12 * parameters
    assert layout.memory[0].weights == 2 * sum(cost.held for cost in layout.costs) + 4 * parameters


def test_below_the_first_trained_layer_nothing_is_kept():
    """A stage that receives keeps all: it goes back to what it received."""
    flags = ("--model", str(CONF / "models/qwen2.5-7b.json"), "--ranks", "2", "--pipe_parallel_size", "2")
    layers = "|".join(map(str, range(24)))
    _, _, layout = dry(*flags, "--freeze", f"embed_tokens,layers\\.({layers})\\.", "--partition_method", "14,17")
    _, _, every = dry(*flags, "--partition_method", "14,17")
    assert layout.memory[0].activations < 0.1 * every.memory[0].activations
    assert 0.7 < layout.memory[1].activations / every.memory[1].activations < 1
    assert layout.memory[0].optimizer == 0
    forward, backward = multiply_adds(layout.costs)
    assert [b > 0 for b in backward] == [layer >= 25 for layer in range(31)]
    assert forward == multiply_adds(every.costs)[0]


def test_picture_shows_neighbours():
    args = parse_arguments(["--dry_run", "--model", "m", "--gradient_accumulation_steps", "4"])
    made = spec(num_attention_heads=4, num_key_value_heads=4)
    text = describe(args, "llama", plan_layout(args, made, mesh_sizes(32, 2, 2, 2), host=False))
    assert "stage 1  16-17 18-19  20-21 22-23  24-25 26-27  28-29 30-31" in text
    wide = describe(args, "llama", plan_layout(args, made, mesh_sizes(64, 1, 1, 1), host=False))
    assert "stage 0  0          1          ...  63" in wide


@pytest.mark.parametrize("head", ["autograd's", "normalized", "summed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_holds_what_it_says(dtype, head):
    """Measured by the allocations of the real function; see also benchmarks/memory.py."""
    hidden = torch.randn(40, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(800, 64, dtype=dtype, requires_grad=True)
    labels, sums = torch.randint(800, (40,)), None
    existing = [hidden, weight, labels]
    if dtype == torch.float32:
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
        existing += [hidden.grad, weight.grad]
    else:
        weight.register_post_accumulate_grad_hook(add_to_sum)
    if head == "summed":
        sums = HeadSum(torch.zeros(800, 64), empty=False, factor=1.0)
        existing.append(sums.total)
    with Alive(existing) as alive:
        loss = linear_cross_entropy(hidden, normalize(weight) if head == "normalized" else weight, labels, head=sums)
        forward, saved = alive.most, alive.now
        alive.most = saved
        loss.backward()
    told = loss_memory(40, 64, 800, dtype.itemsize, normalized=head == "normalized", summed=head == "summed")
    # Labels, indices of trained tokens and other vectors are left out.
    assert (saved, forward, alive.most) == pytest.approx(
        (told.saved, told.saved + told.forward, told.saved + told.backward), rel=0.1
    )


@pytest.mark.parametrize("head", ["autograd's", "normalized", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_pairs_holds_what_it_says(dtype, head):
    """Logits of a head that is trained are made twice; nothing of them is kept between."""
    hidden = torch.randn(40, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(800, 64, dtype=dtype, requires_grad=head != "frozen")
    targets = Targets(torch.arange(40), torch.randint(800, (40,)))
    existing = [hidden, weight, *targets]
    if dtype == torch.float32:
        for leaf in existing[: 1 + weight.requires_grad]:
            leaf.grad = torch.zeros_like(leaf)
            existing.append(leaf.grad)
    elif weight.requires_grad:
        weight.register_post_accumulate_grad_hook(add_to_sum)
    with Alive(existing) as alive:
        found = token_log_probs(hidden, normalize(weight) if head == "normalized" else weight, targets).sum()
        forward, saved = alive.most, alive.now
        alive.most = saved
        found.backward()
    normalized, trained = head == "normalized", head != "frozen"
    told = loss_memory(40, 64, 800, dtype.itemsize, trained, normalized, summed=True, twice=trained)
    kept = told.saved - (hidden.nbytes if trained else 0)  # which are there anyhow
    assert (forward, alive.most) == pytest.approx((kept + told.forward, kept + told.backward), rel=0.05)
    assert saved == pytest.approx(kept, rel=0.05, abs=800)  # log-sum-exps are left out


def test_preferences_cost_the_head_once_more():
    """In time, not in what a step is said to compute; with adapters it is as ever."""
    flags = ("--model", str(CONF / "models/qwen2.5-7b.json"), "--ranks", "2", "--pipe_parallel_size", "2")
    plain, pairs, adapted = (
        dry(*flags, *more)[2] for more in ((), ("--objective", "dpo"), ("--objective", "dpo", "--lora_dim", "8"))
    )
    assert pairs.costs[-1].time == pytest.approx(4 / 3 * plain.costs[-1].time)
    assert multiply_adds(pairs.costs) == multiply_adds(plain.costs)
    assert adapted.costs[-1].again == 0
