"""What is reported of a run: FLOPs against torch's own count, times against a clock that is told what to say."""

import contextlib
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from fft.models.lora import Lora, adapt
from fft.models.spec import ModelSpec
from fft.parallel.mesh import MeshSizes
from fft.planning.costs import LayerCost, layer_costs, multiply_adds
from fft.planning.layout import Layout
from fft.planning.partition import pipeline_bubble
from fft.training import metrics
from fft.training.environment import commit_of
from fft.training.metrics import (
    Lap,
    Stopwatch,
    matrix_rate,
    mean_balance,
    open_metrics,
    peak_memory,
)
from fft.training.run_folder import Start
from fft.training.schedule import lr_multiplier
from fft.training.work import Work, datasheet_rate, flops_per_token


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_torch_counts(tied):
    tokens = 128
    config = AutoConfig.for_model(**{**SMALL, "model_type": "llama", "hidden_size": 128, "tie_word_embeddings": tied})
    ours = flops_per_token([cost.flops for cost in layer_costs(ModelSpec(config, torch.float32), tokens)])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None] % config.vocab_size).logits.sum().backward()
    # Eager attention computes what the mask hides, too: half of the scores.
    hidden = 6.0 * config.num_hidden_layers * config.hidden_size * tokens
    assert ours + hidden == pytest.approx(counter.get_total_flops() / tokens, rel=0.01)


def test_flops_of_adapters_are_those_torch_counts():
    """Weights that are frozen have no gradient, what went into them has one."""
    tokens, lora = 128, Lora(8, 16, ("q_proj", "v_proj", "down_proj"))
    config = AutoConfig.for_model(**{**SMALL, "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 8})
    made = ModelSpec(config, torch.float32, lora=lora)
    ours = flops_per_token(*multiply_adds(layer_costs(made, tokens)))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    adapt(model, "model.layers", lora)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None] % config.vocab_size).logits.sum().backward()
    hidden = 6.0 * config.num_hidden_layers * config.hidden_size * tokens
    # Of the first layer's projections torch does not go back to the embedding, which is frozen.
    assert ours + hidden == pytest.approx(counter.get_total_flops() / tokens, rel=0.03)
    every = flops_per_token([cost.flops for cost in layer_costs(ModelSpec(config, torch.float32), tokens)])
    assert ours < 0.8 * every


def test_bubble():
    assert pipeline_bubble(1, 8) == 0
    assert pipeline_bubble(4, 9) == pytest.approx(3 / 12)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 9), (8, 3), (8, 64)])
def test_bubble_of_stages_that_are_not_equal(stages, micro_batches):
    """All wait for the slowest, which waits for the pipeline to fill and to drain."""
    equal = pipeline_bubble(stages, micro_batches, [1.0] * stages, [2.0] * stages)
    assert equal == pytest.approx(pipeline_bubble(stages, micro_batches))
    forward = [1.0 + stage % 3 for stage in range(stages)]
    whole = (sum(forward) + (micro_batches - 1) * max(forward)) * 3
    expected = 1 - 3 * micro_batches * sum(forward) / (stages * whole)
    given = pipeline_bubble(stages, micro_batches, forward, [2 * time for time in forward])
    assert given == pytest.approx(expected, abs=0.03)
    assert given >= equal - 1e-9


def test_matrix_rate_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert math.isfinite(matrix_rate(torch.float32, torch.device("cpu")))
    assert matrix_rate(torch.bfloat16, torch.device("cpu")) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # more bytes than ever before
    assert peak_memory(torch.device("cpu")) > before + 2**25
    del held


def test_stopwatch():
    now = 100.0
    watch = Stopwatch(step=10, clock=lambda: now)
    now += 4  # two steps of 2 s, a quarter of which is waiting
    watch.waited(1.0)
    watch.computed(100, 5e3)
    watch.computed(60, 1e3)
    lap = watch.lap(12, total=20)
    assert lap.flops == 1500.0
    assert (lap.rate, lap.data_wait, lap.elapsed, lap.left) == (40.0, 0.25, 4.0, 16.0)
    with watch.paused():
        now += 50
    now += 6
    watch.computed(3)
    lap = watch.lap(15, total=20)
    assert (lap.rate, lap.data_wait, lap.elapsed, lap.left) == (0.5, 0.0, 60.0, 60.0)


def test_commit_of_a_checkout(tmp_path):
    assert commit_of(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


@pytest.fixture
def four_ranks(monkeypatch):
    """A process that takes itself for one of four that all have the same numbers; two of them share each row."""
    both = {dist.ReduceOp.SUM: lambda x: x.mul_(4), dist.ReduceOp.MAX: lambda x: x}
    reduce = lambda x, operation=dist.ReduceOp.SUM, group=None: both[operation](x)  # noqa: E731
    monkeypatch.setattr(metrics.dist, "all_reduce", reduce)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda group=None: 4 if group is None else 2)
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(metrics, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(metrics, "peak_memory", lambda _: 3 << 30)


def opened(name, dtype):
    """Metrics of four ranks that are replicas, with what they say and the numbers that they hand to their sinks."""
    said, written = [], {}
    args = SimpleNamespace(checkpoint=None, gradient_accumulation_steps=1, checkpoint_grad_interval=0, dtype=name)
    args.seq_len = 64
    mesh = MeshSizes(4, 1)
    layout = Layout(mesh, [0, 1], [LayerCost(1000.0, 2000.0, 1000, 1000, 1000, 1000)], [])
    plan = SimpleNamespace(total_steps=9, mesh=mesh)
    with contextlib.ExitStack() as held:
        shown = open_metrics(args, plan, layout, dtype, torch.device("cpu"), Start(), held, said.append)
    shown.sinks.add("all", lambda: SimpleNamespace(write=lambda _, values: written.update(values)))
    return shown, said, written


def test_numbers_are_of_all_ranks(four_ranks):
    """Tokens a second and what devices can do add up, memory is that of the fullest, utilisation is of all devices."""
    shown, said, written = opened("fp32", torch.float32)
    assert "reach 0.001 TFLOP/s a device" in said[0]
    values = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "skipped_steps": 0}
    shown.show(1, values, Lap(rate=10_000.0, flops=10_000.0 * 6000, data_wait=0.0, elapsed=1.0, left=1.0))
    assert (written["tokens_per_second"], written["tokens_per_second_per_device"]) == (40_000, 10_000)
    assert written["mfu"] == pytest.approx(40_000 * 6000 / 4e9)
    assert "mfu_datasheet" not in written
    assert written["memory"] == 3 << 30
    assert "40,000 tokens/s  MFU 6.0%" in said[-1]
    assert "3.00 GiB" in said[-1]


def test_utilisation_names_what_it_is_of(four_ranks, monkeypatch):
    """Of what products were measured to reach, and of the datasheet where there is one."""
    monkeypatch.setattr(metrics, "datasheet_rate", lambda *_: 2e9)
    monkeypatch.setattr(metrics, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    shown, said, written = opened("bf16", torch.bfloat16)
    assert "reach 0.001 TFLOP/s a device, of 0.002 by the datasheet of NVIDIA H100 80GB HBM3" in said[0]
    values = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "skipped_steps": 0}
    shown.show(1, values, Lap(rate=10_000.0, flops=6e7, data_wait=0.0, elapsed=1.0, left=1.0))
    assert (written["mfu"], written["mfu_datasheet"]) == (pytest.approx(0.06), pytest.approx(0.03))
    assert "MFU 6.0%, of the datasheet 3.0%  " in said[-1]


def test_no_datasheet_is_known_of_a_cpu_and_of_wide_types(monkeypatch):
    assert datasheet_rate(torch.device("cpu")) is None
    monkeypatch.setattr("fft.training.work.device_name", lambda _: "NVIDIA H200")
    assert datasheet_rate(torch.device("cuda")) == pytest.approx(989.4e12)
    assert datasheet_rate(torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize("lora", [None, Lora(8, 16, ("q_proj", "down_proj"))])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_work_is_that_of_the_documents_as_they_are(kind, lora):
    """Of documents of one length it is what layers were counted for; of others the mean of theirs."""
    sizes = {**SMALL, "model_type": kind, "hidden_size": 128, "num_hidden_layers": 4}
    sizes |= {"sliding_window": 24} if kind == "gemma2" else {}
    made = ModelSpec(AutoConfig.for_model(**sizes), torch.float32, lora=lora)
    work, whole = Work.of(layer_costs(made, 128), 128), {}
    for length in (16, 32, 128):
        whole[length] = flops_per_token(*multiply_adds(layer_costs(made, length)))
        bounds = [*range(0, 129, length), 128, 128]  # as micro-batches pad them
        assert work.flops(128, bounds) == pytest.approx(128 * whole[length])
    mixed = work.flops(96, [0, 32, 48, 64, 96])
    assert mixed == pytest.approx(64 * whole[32] + 32 * whole[16])
    assert set(work.pairs) == ({None} if kind == "llama" else {None, 24})


def test_the_balance_of_experts_is_the_mean_over_rows(four_ranks):
    """Ranks of a row have shares of its losses: two layers' losses of 1.5 are 0.75 each, twice."""
    balance = SimpleNamespace(total=2 * 0.75, count=2, sequence=object())
    assert mean_balance(balance, torch.device("cpu")) == {"aux_loss": pytest.approx(1.5)}
    balance = SimpleNamespace(total=2 * 1.5, count=2, sequence=None)
    assert mean_balance(balance, torch.device("cpu")) == {"aux_loss": pytest.approx(1.5)}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules_end_where_they_should(kind):
    rates = [lr_multiplier(kind, 4, 20, 0.25)(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[20] == pytest.approx(1.0 if kind == "constant" else 0.25)
    assert min(rates[4:]) >= 0.25 - 1e-12
    assert (rates[19] > rates[20]) == (kind != "constant")


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("cosine", [1.0, 0.25 + 0.75 * (1 + 0.5**0.5) / 2, 0.625, 0.25 + 0.75 * (1 - 0.5**0.5) / 2, 0.25]),
        ("linear", [1.0, 0.8125, 0.625, 0.4375, 0.25]),
        ("wsd", [1.0, 1.0, 1.0, 0.625, 0.25]),
        ("constant", [1.0] * 5),
    ],
)
def test_schedules_follow_their_formulas(kind, rates):
    """At the end of the warm-up and every quarter of what follows; the last half decays, where a kind has a decay."""
    multiplier = lr_multiplier(kind, 4, 20, 0.25, decay_ratio=0.4)
    assert [multiplier(step) for step in (4, 8, 12, 16, 20)] == pytest.approx(rates)
    assert multiplier(21) == pytest.approx(rates[-1])
