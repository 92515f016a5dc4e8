"""The models that are measured, by their config.json, as many of their layers as a device holds, and their FLOPs."""

import bisect
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig

from benchmarks.device.frame import Setting
from benchmarks.device.hardware import device_memory, matrix_rate
from benchmarks.engines import Workload
from fft.ops.fused import fused_ops
from fft.planning.costs import layer_costs
from fft.training.work import Work

#: Of all: Llama 3's vocabulary, head counts and rotary embedding.
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}
_SHAPES = {
    # meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"original_max_position_embeddings": 8192}
#: For rehearsals.
_SMALLEST = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMALLEST |= {"vocab_size": 256, "num_key_value_heads": 2}
#: Ways to recompute, as flags of the trainer.
RECOMPUTE = {"none": (), "selective": ("--checkpoint_grad_selective",), "full": ("--checkpoint_grad_interval=1",)}
#: Layers that are measured at most: the whole model is extrapolated by the time of one, and building it takes a minute.
_MOST_LAYERS = 8
#: Tokens that a micro-batch has at least: shorter rows come several at a time.
_MICRO_BATCH = 8192
#: Seconds that a step should take at most, and the share of the matrix rate by which that is guessed.
_LONGEST, _LIKELY = 3.0, 0.4
#: Share of the free memory that a plan may fill: it knows nothing of fragments.
_FILLED = 0.92


@dataclass(frozen=True)
class Case:
    """A model, tokens a row and of a document (None: a row is one), recomputation, and whether operators are fused or
    layers compiled.
    """

    shape: str
    row: int
    recompute: str = "none"
    fused: bool = True
    document: int | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """Of no other case."""
        parts = [self.shape, f"rows of {self.row}", f"recompute {self.recompute}"]
        parts += [] if self.fused else ["plain operators"]
        parts += ["compiled"] if self.compiled else []
        return ", ".join(parts + ([f"documents of {self.document}"] if self.document else []))


def model_config(shape: str, smallest: bool = False) -> PretrainedConfig:
    """Llama-3 of 1B, 3B or 8B; ``smallest``: something tiny in its place."""
    sizes = {**_LLAMA_3, **(_SMALLEST if smallest else _SHAPES[shape])}
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    rope = {**_ROPE, "factor": 8.0 if shape == "8B" else 32.0}
    return AutoConfig.for_model(
        "llama", **sizes, head_dim=head, rope_parameters=rope, tie_word_embeddings=shape != "8B"
    )


def workload(shape: str, row: int, flags: tuple[str, ...] = (), *, micro_batches: int = 8, smallest: bool) -> Workload:
    """Steps of a model in bf16 on rows of ``row`` tokens, each one document."""
    samples = 1 if smallest else max(1, _MICRO_BATCH // row)
    config = model_config(shape, smallest)
    return Workload(config, row, micro_batches, samples, flags=("--dtype=bf16", *flags), noise=True)


def with_layers(work: Workload, layers: int) -> Workload:
    """The same with so many of its decoder layers."""
    config = copy.deepcopy(work.config)
    config.num_hidden_layers = layers
    return dataclasses.replace(work, config=config)


def planned_bytes(work: Workload) -> int:
    """What the planner says that it takes."""
    return work.plan()[2].memory[0].total


def layers_that_fit(work: Workload, memory: int, planned: Callable[[Workload], int] = planned_bytes) -> int:
    """The most of a model's layers that fit, by the planner's memory table, into so many bytes of a device."""
    counts = range(1, work.config.num_hidden_layers + 1)
    return bisect.bisect_right(counts, _FILLED * memory, key=lambda layers: planned(with_layers(work, layers)))


def operators(setting: Setting, fused: bool) -> str:
    """Name of those that a device gets."""
    found = fused_ops(setting.device.type) if fused else None
    return "plain" if found is None else found.name


def fitted(setting: Setting, case: Case) -> tuple[Workload, int]:
    """A step of the whole model, of fewer micro-batches than eight where it would take long; how many layers fit."""
    flags = (*RECOMPUTE[case.recompute], f"--fused_ops={'auto' if case.fused else 'none'}")
    flags = (*flags, "--compile") if case.compiled else flags
    work = workload(case.shape, case.row, flags, micro_batches=2 if setting.smallest else 8, smallest=setting.smallest)
    work = dataclasses.replace(work, document=case.document)
    layers = min(_MOST_LAYERS, layers_that_fit(work, device_memory(setting.device)))
    if layers and not setting.smallest:
        seconds = step_flops(with_layers(work, layers)) / work.micro_batches / (_LIKELY * matrix_rate(setting))
        work = dataclasses.replace(work, micro_batches=max(2, min(8, int(_LONGEST / seconds))))
    return work, layers


def step_flops(work: Workload) -> float:
    """FLOPs that the mathematics of a step needs."""
    made = Work.of(layer_costs(work.plan()[1], work.seq_len), work.seq_len)
    return work.micro_batches * made.flops(work.tokens, work.bounds)
