"""The planner's memory table against the most that the device's allocator gave out."""

import functools

from benchmarks.device.frame import Cases, Row, Setting
from benchmarks.device.shapes import RECOMPUTE, with_layers, workload
from benchmarks.engines import Workload
from benchmarks.memory import measure as measured

#: Model, layers, tokens a row, further flags; the last --dtype counts. Of 8B that 80 GB hold.
CONFIGURATIONS = (
    ("8B", 4, 8192, ()),
    ("8B", 8, 8192, ()),
    ("8B", 4, 8192, RECOMPUTE["selective"]),
    ("8B", 4, 8192, RECOMPUTE["full"]),
    ("8B", 2, 32768, RECOMPUTE["full"]),
    ("8B", 4, 8192, ("--fused_ops=none",)),
    ("1B", 16, 8192, ()),
    ("1B", 4, 8192, ("--dtype=fp16",)),
    ("1B", 4, 2048, ("--dtype=fp32",)),
    ("8B", 4, 8192, ("--offload_optimizer",)),
    ("8B", 4, 8192, ("--lora_dim=16",)),
)
SMALLEST = (
    ("8B", 2, 128, ()),
    ("1B", 2, 128, (*RECOMPUTE["selective"], "--dtype=fp32")),
    ("8B", 2, 128, ("--lora_dim=4",)),
)


def cases(setting: Setting) -> Cases:
    """One row each."""
    for shape, layers, row, flags in SMALLEST if setting.smallest else CONFIGURATIONS:
        work = with_layers(workload(shape, row, flags, micro_batches=2, smallest=setting.smallest), layers)
        name = ", ".join((shape, f"{layers} layers", f"rows of {row}", *flags))
        yield name, functools.partial(measure, shape, work, flags)


def measure(shape: str, work: Workload, flags: tuple[str, ...]) -> list[Row]:
    """Predicted and measured of one configuration."""
    told = measured(work)
    row: Row = {"model": shape, "layers": str(work.config.num_hidden_layers), "row": str(work.seq_len)}
    row |= {"flags": " ".join(flags) or "-"}
    row |= {f"{part} GB": told[part] / 1e9 for part in ("weights", "optimizer", "activations", "loss", "step")}
    row |= {"predicted GB": told["total"] / 1e9, "measured GB": told["peak"] / 1e9}
    row |= {"predicted of measured %": 100 * told["total"] / max(1, told["peak"])}
    return [row]
