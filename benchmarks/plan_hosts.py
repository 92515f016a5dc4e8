"""Steps over shaped links between two machines made of namespaces, beside what fft.plan predicts of them.

    python -m benchmarks.plan_hosts --keep docs/planner-hosts.json       five layouts on four links: 11 minutes
    python -m benchmarks.plan_hosts --from docs/planner-hosts.json       the same figures, predicted again: a second

Needs root, for namespaces (:mod:`benchmarks.hosts`), and a machine on which nothing else runs. The machine's file is
that of ``python -m fft.plan.measure``, run by both ranks on a link without limits; of each shaped link latency and
bandwidth are measured in the same way, before the steps. Nothing is fitted on the steps themselves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from benchmarks.hosts import Hosts, why_not
from benchmarks.links import TOKENS, run_over, write_inputs
from benchmarks.plan_links import read_times
from fft.console import format_table
from fft.plan.hardware import Link, Machine, read_machine
from fft.plan.link_rates import LinkTimes
from fft.plan.measured import between_link
from fft.plan.ours import read_job, shape_of_spec, stack_on
from fft.plan.run import PlannedRun, Sides
from fft.plan.shape import Shape
from fft.plan.step import predict
from fft.plan.validate import error_summary

ROWS = 4


@dataclass(frozen=True)
class Case:
    """A layout of two ranks: its flags, and the same as a plan has it."""

    flags: str
    sides: Sides
    micro: int
    accumulated: int
    bounds: tuple[int, ...] | None = None


def _pipe(micro: int) -> Case:
    """Embedding and four layers; four layers, norm and head."""
    flags = f"--pipe_parallel_size 2 --partition_method 5,6 --per_device_train_batch_size {micro}"
    count = ROWS // micro
    return Case(f"{flags} --gradient_accumulation_steps {count}", Sides(pipe=2), micro, count, (0, 5, 10))


CASES = {
    "pipe 2, 4 micro-batches": _pipe(1),
    "pipe 2, 2 micro-batches": _pipe(2),
    "data 2": Case(f"--gradient_accumulation_steps {ROWS // 2}", Sides(data=2), 1, ROWS // 2),
    "tensor 2": Case(f"--model_parallel_size 2 --gradient_accumulation_steps {ROWS}", Sides(tensor=2), 1, ROWS),
    "sequence 2": Case(f"--sequence_parallel_size 2 --gradient_accumulation_steps {ROWS}", Sides(sequence=2), 1, ROWS),
}


@dataclass(frozen=True)
class Wire:
    """A link: ``rate`` Mbit/s each way, and ``delay`` milliseconds, by a wire in user space where it is not 0."""

    rate: float
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.rate:g} Mbit/s" + (f", {self.delay:g} ms" if self.delay else "")


#: Those with a delay come last: the wire stays.
WIRES = (Wire(100), Wire(1000), Wire(10000), Wire(100, 1.0))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed on the slowest link, after a first")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--wires", nargs="+", default=[f"{wire.rate:g}:{wire.delay:g}" for wire in WIRES])
    parser.add_argument("--keep", type=Path, help="a file for what was measured")
    parser.add_argument("--from", dest="given", type=Path, help="such a file, to be predicted again")
    args = parser.parse_args(argv)
    if args.given is not None:
        print(told(json.loads(args.given.read_text(encoding="utf-8"))))
        return
    if (reason := why_not()) is not None:
        parser.error(f"no machines can be made here: {reason}")
    wires = [Wire(*map(float, text.split(":"))) for text in args.wires]
    with tempfile.TemporaryDirectory() as folder, Hosts(2, Path(folder, "hosts")) as hosts:
        measured = measure(hosts, Path(folder), args.cases, wires, args.steps)
    if args.keep:
        args.keep.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(told(measured))


def measure(hosts: Hosts, folder: Path, cases: Sequence[str], wires: Sequence[Wire], steps: int) -> dict:
    """The machine's file, and of each link what was measured of it and the seconds of each layout's step on it."""
    write_inputs(folder)
    hosts.shape(None)
    _ranks(hosts, "-m", "fft.plan.measure", "-o", folder / "machine.yaml")
    print((folder / "machine.yaml").read_text(encoding="utf-8"), file=sys.stderr, flush=True)
    found: dict = {"machine": (folder / "machine.yaml").read_text(encoding="utf-8"), "links": []}
    for wire in wires:
        if wire.delay:
            hosts.disturb(wire.delay / 1e3, 0.0)
        # A bucket as small as can be, for a link carries no bursts: 0.2 ms of the rate, a few frames at least.
        hosts.shape(wire.rate * 1e6, burst=max(16_000, round(wire.rate * 1e6 / 8 * 2e-4)))
        link = asdict(_links(hosts))
        found["links"].append({"rate": wire.rate, "delay": wire.delay, "times": link, "steps": {}})
        for case in cases:
            count = steps if wire.rate <= 200 else 2 * steps
            seconds, _ = run_over(hosts, folder, CASES[case].flags, count + 1, "bf16")
            found["links"][-1]["steps"][case] = seconds
            print(f"{case}, {wire}: {seconds:.3f} s", file=sys.stderr, flush=True)
    return found


def _ranks(hosts: Hosts, *command: object) -> str:
    """A command as a rank on each machine: what the first prints. Raises RuntimeError where one fails."""
    ranks = [
        hosts.start(host, sys.executable, *command, env=hosts.rank(host), stdout=subprocess.PIPE, text=True)
        for host in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {said}")
    return said[0]


def _links(hosts: Hosts) -> LinkTimes:
    return read_times(json.loads(_ranks(hosts, "-m", "benchmarks.plan_links")))


@lru_cache(maxsize=1)
def _shape() -> Shape:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        job = read_job(str(Path(folder, "config.json")), TOKENS, ROWS * TOKENS)
    return shape_of_spec(job.spec, job.name, False)


def predicted(machine: Machine, case: Case) -> float:
    """Seconds of a step on a machine."""
    shape, stack = _shape(), stack_on(machine.device)
    run = PlannedRun(
        machine, shape, case.sides, stack, TOKENS, case.micro, case.accumulated, bounds=case.bounds, at=machine.at
    )
    return predict(run).seconds


def told(measured: dict) -> str:
    """The table, the errors, the crossings."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "machine.yaml").write_text(measured["machine"], encoding="utf-8")
        base = read_machine(Path(folder, "machine.yaml"))
    rows, errors, links = [], [], []
    for link in measured["links"]:
        between, at = between_link(read_times(link["times"]), 1, base.at)
        machine = replace(base, between=between, at=at)
        links.append((link, machine))
        for case, seconds in link["steps"].items():
            expected = predicted(machine, CASES[case])
            errors.append(expected / seconds - 1)
            wire = Wire(link["rate"], link["delay"])
            rate = f"{8e-6 * between.bandwidth:,.0f} Mbit/s, {1e3 * between.latency:.2f} ms"
            rows.append([case, str(wire), rate, seconds, expected, f"{100 * (expected / seconds - 1):+.1f}"])
    heads = ["layout", "link", "link as measured", "seconds a step", "predicted", "error %"]
    text = format_table(heads, rows)
    count, middle, most, worst = error_summary(errors)
    text += f"\n\n{count} combinations, errors: median {middle:.1f} %, nine in ten {most:.1f} %, worst {worst:.1f} %"
    plain = [(link["steps"], machine) for link, machine in links if not link["delay"]]
    return text + "\n\n" + _crossings(plain)


def _crossings(links: list[tuple[dict[str, float], Machine]]) -> str:
    """The bandwidth below which a pipeline is faster than another layout, as measured and as predicted."""
    rows = []
    pipes = [case for case in CASES if CASES[case].sides.pipe > 1]
    others = [case for case in CASES if case not in pipes]
    for pipe in pipes:
        for other in others:
            if not links or not all(pipe in steps and other in steps for steps, _ in links):
                continue
            points = [(1 / machine.between.bandwidth, steps[other] - steps[pipe]) for steps, machine in links]
            measured = _zero(points)

            def gain(inverse: float, pipe: str = pipe, other: str = other) -> float:
                near = min(links, key=lambda link: abs(link[1].between.bandwidth * inverse - 1))[1]
                there = replace(near, between=Link(1 / inverse, near.between.latency))
                return predicted(there, CASES[other]) - predicted(there, CASES[pipe])

            expected = _root(gain, 1e-10, 1e-6)
            names = [f"{8e-6 / x:,.0f}" if x else "none" for x in (measured, expected)]
            rows.append([pipe, other, *names, f"{measured / expected:.2f}" if measured and expected else ""])
    heads = ["faster below", "than", "Mbit/s, measured", "predicted", "predicted / measured"]
    return format_table(heads, rows)


def _zero(points: list[tuple[float, float]]) -> float | None:
    """Where a line through neighbouring points is 0; None where none is."""
    for (a, x), (b, y) in pairwise(sorted(points)):
        if x < 0 <= y:
            return a - x * (b - a) / (y - x)
    return None


def _root(function: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a function that grows is 0, by bisection; None where that is outside."""
    if not function(low) < 0 <= function(high):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high


if __name__ == "__main__":
    main()
