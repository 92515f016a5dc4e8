"""The fastest layouts that fit, without trying them all: most promising first, by what none can be faster than."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise
from typing import Any

from fft.plan.choice import LayoutChoice, Limits, choices
from fft.plan.cut import fastest_cut
from fft.plan.exchanges import send_time
from fft.plan.hardware import Machine
from fft.plan.layers import PassTimes
from fft.plan.ours import Job, Memory, shape_of_spec, stack_on
from fft.plan.run import PlannedRun
from fft.plan.shape import Shape
from fft.plan.step import Prediction, layer_times, predict, update_seconds
from fft.planning.memory import StageMemory

#: The share of a device's memory that a layout may fill, by prediction: the rest is for contexts, libraries' buffers,
#: and what an allocator cannot use.
FILLED = 0.92
#: How close a cut comes to the fastest.
_CLOSE = 1e-4


@dataclass(frozen=True)
class LayoutPlan:
    """A layout that fits. ``bounds`` are of the pipeline's layers: embedding, decoder layers or halves, norm, head."""

    choice: LayoutChoice
    run: PlannedRun
    bounds: tuple[int, ...]
    prediction: Prediction
    memory: tuple[StageMemory, ...]

    @property
    def fullest(self) -> int:
        """Bytes of the fullest device."""
        return max(stage.total for stage in self.memory)


#: What a step of the search finds out of a choice: its least time, and what comes next; None if it cannot be.
_Told = tuple[float, Callable[[], Any] | LayoutPlan] | None


class Search:
    """All layouts of ``ranks`` devices of a machine for a job."""

    def __init__(self, job: Job, machine: Machine, ranks: int) -> None:
        self.job, self.machine, self.ranks = job, machine, ranks
        self.memory = Memory(job)
        self._shapes: dict[bool, Shape] = {}
        self._times: dict[tuple, list[PassTimes]] = {}
        self._cuts: dict[tuple, tuple[int, ...] | None] = {}
        self.seen = self.tried = 0

    def best(self, number: int = 10) -> list[LayoutPlan]:
        """So many layouts, the fastest first; of each its fastest variant."""
        return list(islice(self._in_order(), number))

    def candidates(self) -> Iterator[LayoutChoice]:
        """All choices that the model allows."""
        spec = self.job.spec
        shape = self.shape(False)
        experts = next((p.experts for block in shape.layers for p in block.products if p.experts > 1), 0)
        limits = Limits(
            shape.heads,
            shape.kv_heads,
            len(shape.layers) + 2,
            experts if spec.experts else 0,
            self.job.seq,
            self.job.step_tokens,
        )
        return choices(self.machine, self.ranks, limits)

    def shape(self, split: bool) -> Shape:
        """The model's."""
        if split not in self._shapes:
            self._shapes[split] = shape_of_spec(self.job.spec, self.job.name, split)
        return self._shapes[split]

    def _in_order(self) -> Iterator[LayoutPlan]:
        """Plans by their time. What lies on the heap is either one, or what a choice's plan cannot be faster than."""
        number, found = count(), set()
        heap: list[tuple[float, int, LayoutChoice, Callable[[], _Told] | LayoutPlan]] = []
        for choice in self.candidates():
            self.seen += 1
            heap.append((self._least(choice), next(number), choice, partial(self._cut_step, choice)))
        heapq.heapify(heap)
        while heap:
            seconds, _, choice, step = heapq.heappop(heap)
            if choice.family in found:
                continue
            if isinstance(step, LayoutPlan):
                found.add(choice.family)
                yield step
            elif (told := step()) is not None:
                heapq.heappush(heap, (max(told[0], seconds), next(number), choice, told[1]))

    def _cut_step(self, choice: LayoutChoice) -> "_Told":
        bound = self._cut_bound(choice)
        return None if bound is None else (bound, partial(self._fitting_step, choice))

    def _fitting_step(self, choice: LayoutChoice) -> "_Told":
        fitting = self._fitting(choice)
        return None if fitting is None else (fitting[0], partial(self._plan_step, choice, fitting[1]))

    def _plan_step(self, choice: LayoutChoice, bounds: tuple[int, ...]) -> "_Told":
        plan = self._planned(choice, bounds)
        return plan.prediction.seconds, plan

    def run(self, choice: LayoutChoice) -> PlannedRun:
        """A choice as a run, without stages."""
        return PlannedRun(
            self.machine,
            self.shape(choice.split),
            choice.sides,
            stack_on(self.machine.device, self.job.args.objective),
            self.job.seq,
            choice.micro,
            choice.accumulated,
            choice.again,
            offload=choice.offload,
            at=self.machine.at,
        )

    def _layer_times(self, choice: LayoutChoice) -> list[PassTimes]:
        key = choice.sequence, choice.ulysses, choice.tensor, choice.expert, choice.micro, choice.again, choice.split
        if key not in self._times:
            self._times[key] = layer_times(replace(self.run(choice), accumulated=2))
        return self._times[key]

    def _least(self, choice: LayoutChoice) -> float:
        """No step is faster: a stage has its share of all passes at least, and every layer is on some stage."""
        times = self._seconds(choice)
        whole, most = sum(times), max(times)
        passes = max(choice.accumulated * max(whole / choice.pipe, most), whole)
        return passes + update_seconds(self.run(choice))

    def _cut(self, choice: LayoutChoice) -> tuple[int, ...] | None:
        """The fastest cut, whatever memory it needs."""
        key = (
            choice.sequence,
            choice.ulysses,
            choice.tensor,
            choice.expert,
            choice.micro,
            choice.again,
            choice.split,
            choice.pipe,
        )
        if key not in self._cuts:
            self._cuts[key] = fastest_cut(self._seconds(choice), choice.pipe, tolerance=_CLOSE)
        return self._cuts[key]

    def _cut_bound(self, choice: LayoutChoice) -> float | None:
        """No step of the choice is faster, as stages cannot be cut more evenly.

        The slowest stage computes and sends all micro-batches; the last does so once the first has come through the
        stages before it, and before its gradients have gone back through them.
        """
        bounds = self._cut(choice)
        if bounds is None or not self._may_fit(choice):
            return None
        times, send = self._seconds(choice), self._send(choice)
        slowest = max(sum(times[a:b]) for a, b in pairwise(bounds)) * (1 - _CLOSE)
        # What goes and what comes may do so together.
        first, last = choice.accumulated * (slowest + send), choice.accumulated * (times[-1] + send)
        through = sum(times[:-1]) + 2 * max(0, choice.pipe - 2) * send
        return max(first, through + last) + update_seconds(self.run(choice))

    def _may_fit(self, choice: LayoutChoice) -> bool:
        """Whether some cut may fit, by what a layer needs at the least, wherever it is.

        A stage's layers have weights, gradients and their share of the optimizer's state, and keep something of every
        micro-batch that is in flight there.
        """
        shape, limit = self.shape(choice.split), FILLED * self.machine.device.memory
        blocks = len(shape.layers)
        held = sum(p.parameters / (choice.expert if p.experts > 1 else 1) for b in shape.layers for p in b.products)
        every = sum(block.parameters for block in shape.layers)
        state = 0.0 if choice.offload else 12 * every / (choice.data * choice.sequence)
        weights = (6 * held + state) / choice.tensor / blocks
        kept = self._kept_at_least(choice)
        in_flight = (min(choice.accumulated, choice.pipe - stage) for stage in range(choice.pipe))
        return sum(limit // (weights + kept * count) for count in in_flight) >= blocks

    def _kept_at_least(self, choice: LayoutChoice) -> float:
        """Bytes that a mean layer keeps of a micro-batch: inputs or results of products, or the layer's own input."""
        shape = self.shape(choice.split)
        tokens = choice.micro * self.job.seq // choice.sequence
        if isinstance(choice.recompute, int):
            return 2.0 * tokens * shape.hidden / choice.recompute * (0.5 if choice.split else 1)
        inside = sum(block.qkv + block.active * (1 + block.gated) for block in shape.layers)
        return 2.0 * tokens * inside / choice.tensor / len(shape.layers)

    def plan(self, choice: LayoutChoice) -> LayoutPlan | None:
        """The choice with the fastest stages that fit; None if none do."""
        fitting = self._fitting(choice)
        return None if fitting is None else self._planned(choice, fitting[1])

    def _fitting(self, choice: LayoutChoice) -> tuple[float, tuple[int, ...]] | None:
        """The fastest cut that fits, and seconds that no step with it is below: as in :meth:`_cut_bound`."""
        bounds, memory = self._cut(choice), self.memory.of(choice)
        limit = FILLED * self.machine.device.memory

        def fits(stage: int, start: int, stop: int) -> bool:
            return memory(stage, self._ours(choice, start), self._ours(choice, stop)).total <= limit

        if bounds is None:
            return None
        times = self._seconds(choice)
        if not all(fits(stage, *ends) for stage, ends in enumerate(pairwise(bounds))):
            bounds = fastest_cut(times, choice.pipe, fits)
            if bounds is None:
                return None
        run, send = self.run(choice), self._send(choice)
        stages = [sum(times[a:b]) for a, b in pairwise(bounds)]
        before, least = 0.0, 0.0
        for stage, seconds in enumerate(stages):
            messages = (stage > 0) + (stage < choice.pipe - 1)
            own = seconds + messages * send
            least = max(least, before + 2 * max(0, stage - 1) * send + choice.accumulated * own)
            before += seconds
        return least + update_seconds(run), bounds

    def _planned(self, choice: LayoutChoice, bounds: tuple[int, ...]) -> LayoutPlan:
        self.tried += 1
        run, memory = replace(self.run(choice), bounds=bounds), self.memory.of(choice)
        own = tuple(self._ours(choice, bound) for bound in bounds)
        held = tuple(memory(stage, *ends) for stage, ends in enumerate(pairwise(own)))
        return LayoutPlan(choice, run, own, predict(run), held)

    def _ours(self, choice: LayoutChoice, bound: int) -> int:
        """A bound among the pipeline's layers, where the norm before the head is one of its own."""
        return bound + 1 if bound > len(self.shape(choice.split).layers) + 1 else bound

    def _seconds(self, choice: LayoutChoice) -> list[float]:
        return [layer.forward.seconds + layer.backward.seconds for layer in self._layer_times(choice)]

    def _send(self, choice: LayoutChoice) -> float:
        if choice.pipe == 1:
            return 0.0
        run = self.run(choice)
        return send_time(self.machine, run.tokens * run.shape.hidden * 2, run.pipe_stride, run.at)
