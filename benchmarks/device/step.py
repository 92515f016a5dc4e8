"""A training step of Llama shapes: as many layers as fit, and what that says of the whole model.

Time is taken with two numbers of layers. Their difference is the time of a layer, its share of the optimizer included;
what the whole model takes is *extrapolated* by it, unless all layers fit. Model FLOPs count attention by the documents
as they are, causal once, and nothing that is computed again.
"""

import functools

from benchmarks.device import layer, profile
from benchmarks.device.frame import Cases, Row, Setting, milliseconds, peak_bytes
from benchmarks.device.hardware import matrix_rate
from benchmarks.device.shapes import Case, fitted, operators, planned_bytes, step_flops, with_layers
from benchmarks.engines import Workload, with_engine
from fft.training.work import datasheet_rate

#: ms of a layer and a micro-batch, and MFU of the datasheet's rate, that were predicted for an H100 and 8B, with fused
#: operators and FlashAttention-2, before any was measured: by tokens a row, recomputation, fused operators.
PREDICTED = {
    (4096, "none", True): (21.6, 44.0),
    (4096, "selective", True): (21.9, 44.0),
    (4096, "full", True): (28.5, 37.0),
    (4096, "none", False): (25.6, 38.0),
    (8192, "none", True): (24.5, 42.0),
    (8192, "selective", True): (24.8, 42.0),
    (8192, "full", True): (32.2, 35.0),
    (8192, "none", False): (28.5, 38.0),
    (32768, "selective", True): (165.8, 38.0),
    (32768, "full", True): (211.3, 32.0),
    (32768, "selective", False): (187.1, 35.0),
}


#: Most wanted first: 8B at 8k in every way, and where its time goes.
FIRST = (
    Case("8B", 8192),
    Case("8B", 8192, "selective"),
    Case("8B", 8192, "full"),
    Case("8B", 8192, fused=False),
    Case("8B", 8192, compiled=True),
    Case("8B", 32768, "selective"),
    Case("8B", 4096),
    Case("8B", 2048),
)
#: The rest, after the layer by itself.
LATER = (
    Case("8B", 8192, document=1024),
    Case("8B", 32768, "full"),
    Case("8B", 32768, "selective", fused=False),
    Case("8B", 32768, "selective", document=2048),
    Case("8B", 8192, "selective", compiled=True),
    Case("1B", 2048, compiled=True),
    *(Case("8B", 4096, way) for way in ("selective", "full")),
    Case("8B", 4096, fused=False),
    *(Case(shape, row) for shape in ("3B", "1B") for row in (8192, 4096, 2048)),
    *(Case(shape, 32768, "selective") for shape in ("3B", "1B")),
    *(Case(shape, 8192, way) for shape in ("3B", "1B") for way in ("selective", "full")),
    *(Case(shape, 8192, fused=False) for shape in ("3B", "1B")),
)
#: Whose time is told by kinds of kernels.
PROFILED = (Case("8B", 8192), Case("8B", 8192, fused=False), Case("8B", 32768, "selective"), Case("1B", 2048))
SMALLEST = (
    Case("8B", 128),
    Case("1B", 128, "full", document=32),
    Case("8B", 128, fused=False),
    Case("8B", 128, compiled=True),
)
SMALLEST_PROFILED = (Case("8B", 128, "selective"),)


def cases(setting: Setting) -> Cases:
    """Steps, some of them with a profile, and a decoder layer by itself."""
    profiled = SMALLEST_PROFILED if setting.smallest else PROFILED
    for case in SMALLEST if setting.smallest else FIRST:
        yield case.name, functools.partial(measure, setting, case)
    for case in profiled:
        yield f"profile: {case.name}", functools.partial(profile.measure, setting, case)
    yield from layer.cases(setting)
    for case in () if setting.smallest else LATER:
        yield case.name, functools.partial(measure, setting, case)


def measure(setting: Setting, case: Case) -> list[Row]:
    """The row of a case."""
    told: Row = {"model": case.shape, "row": str(case.row), "document": str(case.document or case.row)}
    told |= {"recompute": case.recompute, "operators": "compiled" if case.compiled else operators(setting, case.fused)}
    if not case.fused and told["operators"] == operators(setting, True):
        return [told | {"layers": "no fused operators here: the other rows are without"}]
    whole, layers = fitted(setting, case)
    if not layers:
        return [told | {"layers": "not even one layer fits"}]
    ran = with_layers(whole, layers)
    time, most = _time(setting, ran)
    count = whole.config.num_hidden_layers
    told |= {"layers": f"{layers} of {count}", "micro-batches": str(whole.micro_batches), "ran ms": time}
    told |= utilisation(setting, "ran", step_flops(ran) / time * 1e3)
    told |= {"peak GB": most / 1e9, "planned GB": planned_bytes(ran) / 1e9}
    fewer = layers // 2
    if fewer:
        each = (time - _time(setting, with_layers(whole, fewer))[0]) / (layers - fewer)
        told |= {"layer ms": each / whole.micro_batches}
        step = time + each * (count - layers)
        told |= {"whole model": "measured" if layers == count else "extrapolated per layer", "step ms": step}
        told |= {"tokens/s": whole.micro_batches * whole.tokens / step * 1e3}
        told |= utilisation(setting, "whole", step_flops(whole) / step * 1e3)
    predicted = PREDICTED.get((case.row, case.recompute, case.fused)) if case.shape == "8B" else None
    if predicted is None or case.document:
        predicted = "", ""
    return [told | {"H100 predicted layer ms": predicted[0], "H100 predicted ran MFU %": predicted[1]}]


def _time(setting: Setting, work: Workload) -> tuple[float, int]:
    """ms of a step, and the most bytes that it took."""
    repeats = 2 if setting.smallest else 3
    return with_engine(work, lambda step, _: (milliseconds(step, setting.device, repeats), peak_bytes(setting.device)))


def utilisation(setting: Setting, what: str, rate: float) -> Row:
    """FLOPs a second as shares of what the datasheet promises and of what products were measured to reach."""
    known = datasheet_rate(setting.device)
    return {
        f"{what} MFU %": "unknown" if known is None else 100 * rate / known,
        f"{what} of matrix rate %": 100 * rate / matrix_rate(setting),
    }
