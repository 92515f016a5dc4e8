"""The search finds what trying everything finds; cuts are those of dynamic programming."""

import itertools
import random
from dataclasses import replace

import pytest

from fft.plan.cut import fastest_cut
from fft.plan.hardware import HARDWARE, read_machine
from fft.plan.layers import head_times
from fft.plan.ours import arguments_of, mesh_of, read_job
from fft.plan.search import FILLED, Search
from fft.planning.layout import plan_layout
from fft.planning.partition import partition_balanced

MODEL, SMALL = "conf/models/qwen2.5-7b.json", "conf/models/llama-3m.json"


def slowest(times, bounds):
    return max(sum(times[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", range(40))
def test_cuts_are_as_fast_as_those_of_dynamic_programming(seed):
    draw = random.Random(seed)
    times = [draw.choice([1.0, 2.0, draw.random() * 5]) for _ in range(draw.randint(3, 30))]
    stages = draw.randint(1, len(times))
    most = [draw.randint(1, len(times)) for _ in range(stages)]
    free, limited = fastest_cut(times, stages), fastest_cut(times, stages, lambda s, a, b: b - a <= most[s])
    assert slowest(times, free) <= slowest(times, partition_balanced(times, stages)) * 1.0002
    try:
        right = partition_balanced(times, stages, lambda stage, start: min(len(times), start + most[stage]))
    except ValueError:
        assert limited is None
        return
    assert limited is not None
    assert all(b - a <= m for a, b, m in zip(limited, limited[1:], most, strict=False))
    assert slowest(times, limited) <= slowest(times, right) * 1.0002


@pytest.fixture(scope="module")
def machine():
    return read_machine(HARDWARE / "8xa100-40g-pcie.yaml")


@pytest.mark.parametrize(("model", "ranks", "gigabytes"), [(MODEL, 4, 60), (SMALL, 8, 0.09)])
def test_the_search_finds_what_trying_everything_finds(machine, monkeypatch, model, ranks, gigabytes):
    monkeypatch.setattr("fft.plan.choice.MICROS", (1, 2))
    job = read_job(model, 512, 16 * 512)
    small = replace(machine, device=replace(machine.device, memory=gigabytes * 1e9))
    search = Search(job, small, ranks)
    found, every = search.best(10), {}
    for choice in search.candidates():
        plan = search.plan(choice)
        if plan is not None:
            every.setdefault(choice.family, []).append(plan.prediction.seconds)
    right = sorted(min(seconds) for seconds in every.values())[:10]
    assert [plan.prediction.seconds for plan in found] == pytest.approx(right, rel=1e-9)
    assert search.tried < search.seen


def of_preferences(job):
    return replace(job, args=replace(job.args, objective="dpo"))


@pytest.mark.parametrize("learn", [lambda job: job, of_preferences], ids=["tokens", "preferences"])
def test_memory_is_that_of_the_dry_run(machine, learn):
    job = learn(read_job(MODEL, 2048, 64 * 2048))
    for plan in Search(job, machine, 8).best(4):
        layout = plan_layout(arguments_of(job, plan.choice, plan.bounds), job.spec, mesh_of(plan.choice), False)
        assert tuple(layout.bounds) == plan.bounds
        assert [stage.total for stage in layout.memory] == pytest.approx(
            [stage.total for stage in plan.memory], rel=1e-6
        )
        assert plan.fullest <= FILLED * machine.device.memory


def test_preferences_make_the_logits_twice(machine):
    job = read_job(MODEL, 2048, 64 * 2048)
    choice = Search(job, machine, 8).best(1)[0].choice
    plain, pairs = (head_times(Search(each, machine, 8).run(choice)) for each in (job, of_preferences(job)))
    assert pairs.forward == plain.forward
    assert pairs.backward.products > 1.4 * plain.backward.products
