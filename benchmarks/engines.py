"""The product's own engine on random tokens, built as a run builds it: what benchmarks of a step share."""

import contextlib
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from benchmarks.device.frame import release
from fft.arguments import TrainArguments, parse_arguments
from fft.data.batches import MicroBatch
from fft.data.image_batches import Chosen, ImageBatch
from fft.images.rules import ImageRules
from fft.models.causal_lm import Ranks, StageBuilder
from fft.models.lora import is_adapter
from fft.models.spec import ModelSpec
from fft.models.vision import rules_of
from fft.parallel.mesh import mesh_sizes
from fft.parallel.tensor_plan import Shard
from fft.planning.image_load import ImageLoad
from fft.planning.layout import Layout, plan_layout
from fft.training.engine import StageEngine, build_engine, init_distributed, on_host
from fft.training.model import model_spec

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """A model and what a rank takes of it in a step: micro-batches of ``samples`` rows of ``seq_len`` tokens.

    Rows are documents of ``document`` tokens (None: each is one). ``flags`` are further flags of the trainer. With
    ``noise`` weights are made at the cost of a copy, for models that would take minutes to draw. A model that sees
    ``images`` by such rules has in a micro-batch images of so many ``patches`` each.
    """

    config: PretrainedConfig
    seq_len: int
    micro_batches: int
    samples: int = 1
    document: int | None = None
    flags: tuple[str, ...] = ()
    noise: bool = False
    images: ImageRules | None = None
    patches: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.samples * self.seq_len

    @property
    def bounds(self) -> list[int]:
        """Where the documents of a micro-batch begin and end."""
        starts = [row + at for row in range(0, self.tokens, self.seq_len) for at in self._starts()]
        return [*starts, self.tokens]

    def _starts(self) -> range:
        return range(0, self.seq_len, self.document or self.seq_len)

    def plan(self) -> tuple[TrainArguments, ModelSpec, Layout]:
        """Arguments, model and layout of the launcher's world, of one rank without."""
        fixed = ("--model=.", "--num_train_epochs=0", "--output_dir=unwritten", "--lr_scheduler_type=constant")
        lengths = (
            f"--seq_len={self.seq_len}",
            f"--gradient_accumulation_steps={self.micro_batches}",
            f"--per_device_train_batch_size={self.samples}",
        )
        args = parse_arguments([*fixed, *lengths, f"--dtype={'fp32' if on_host() else 'bf16'}", *self.flags])
        spec = model_spec(args, self.config, self.images)
        sizes = args.pipe_parallel_size, args.sequence_parallel_size, args.model_parallel_size
        mesh = mesh_sizes(int(os.environ.get("WORLD_SIZE", "1")), *sizes, args.expert_parallel_size)
        patches = sum(self.patches)
        load = ImageLoad(patches / self.tokens, float(max(self.patches, default=0)), patches // self.samples)
        return args, spec, plan_layout(args, spec, mesh, on_host(), load)

    def build(self) -> tuple[Callable[[], float], StageEngine]:
        """A step on random tokens, which returns its loss once the device is done, and the engine that takes it.

        Collective: the first that is built joins the ranks.
        """
        join()
        args, spec, layout = self.plan()
        ranks = Ranks.join(spec, layout.mesh, args.ulysses_degree)
        builder = StageBuilder(spec, ranks, weights=Noise(spec) if self.noise else None)
        engine = build_engine(args, builder, layout.mesh, layout.bounds, 1)
        batches = self.batches() if engine.shared is None else self.batches(engine.shared.chosen)

        def step() -> float:
            loss = engine.step(batches)
            torch.get_device_module(engine.device).synchronize()
            return loss

        return step, engine

    def batches(self, chosen: Chosen | None = None) -> list[MicroBatch]:
        """A step's micro-batches, of which every token is trained; with patches of those images that are ``chosen``."""
        vocabulary = self.config.get_text_config().vocab_size
        ids = np.random.default_rng(0).integers(vocabulary, size=(self.micro_batches, self.tokens))
        bounds = np.full(self.tokens + 1, self.tokens, np.int32)
        bounds[: len(self.bounds)] = self.bounds
        images = [None] * len(ids) if self.images is None else self._images(self.images, chosen)
        return [
            MicroBatch(row[None].astype(np.int32), np.roll(row, -1), bounds, self.tokens, seen)
            for row, seen in zip(ids, images, strict=True)
        ]

    def _images(self, rules: ImageRules, chosen: Chosen | None) -> list[ImageBatch]:
        """Of every micro-batch the same, at its begin, each two patches high."""
        grids = np.array([*((1, 2, size // 2) for size in self.patches), (1, 2, 2)], np.int32)
        tokens = sum(self.patches) // rules.merge**2
        places = np.append(np.arange(tokens), -1)
        index = np.stack([places, np.arange(tokens + 1)]).astype(np.int32)
        positions = np.tile(np.arange(self.tokens, dtype=np.int32), (3, 1))
        steps = [grids[:-1]] * self.micro_batches
        own = [range(len(self.patches)) for _ in steps] if chosen is None else chosen(steps)
        sizes = [sum(self.patches[number] for number in numbers) + rules.merge**2 for numbers in own]
        pixels = (np.zeros((size, 3 * rules.patch**2), np.uint8) for size in sizes)
        return [ImageBatch(positions, index, grids, patches) for patches in pixels]


def join() -> None:
    """Join the launcher's ranks, or be a world of one; what was joined is kept. Collective."""
    if not dist.is_initialized():
        init_distributed()


def with_engine(workload: Workload, use: Callable[[Callable[[], float], StageEngine], T]) -> T:
    """What ``use`` makes of the step and the engine of :meth:`Workload.build`, whose memory the device then has back.

    Where it raises, the memory comes back with :func:`release`, once nobody holds the exception any more.
    """
    step, engine = workload.build()
    device = engine.device
    try:
        return use(step, engine)
    finally:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it removed
            engine.deepspeed.destroy()
        # Its last outputs have hooks that hold it, a circle by way of C++, which Python's collector does not see.
        vars(engine.deepspeed).clear()
        del step, engine
        release(device)


class Noise:
    """Stands for files of weights: every matrix is a stretch of the same random numbers, every vector is ones."""

    directory = "random numbers"

    def __init__(self, spec: ModelSpec) -> None:
        #: Of all tensors, as files of the model would have them: without adapters.
        self.names = [name for name in spec.skeleton.state_dict() if not is_adapter(name.removesuffix(".weight"))]
        self._numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    def read(self, _: str, shape: tuple[int, ...], shard: Shard | None = None, *__: object) -> torch.Tensor:
        """Values for a parameter of ``shape``, or a part of it."""
        shape = shape if shard is None else shard.local_shape
        if len(shape) < 2:
            return torch.ones(shape)
        count = math.prod(shape)
        return self._numbers.repeat(-(-count // len(self._numbers)))[:count].view(shape)


def qwen2_vl(hidden: int, layers: int, vocabulary: int, tower: int) -> tuple[PretrainedConfig, ImageRules]:
    """A Qwen2-VL of any size, whose tower has so many blocks of the same width, and what it makes of images."""
    text = llama(hidden, layers, vocabulary).to_dict() | {"model_type": "qwen2_vl_text"}
    heads = max(1, hidden // 64)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision = {"depth": tower, "embed_dim": hidden, "hidden_size": hidden, "num_heads": heads, "patch_size": 14}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, tie_word_embeddings=False)
    return config, rules_of(config, ImageRules("qwen2_vl", 14, 2, 2, 0, 0, 0))


def llama(hidden: int, layers: int, vocabulary: int) -> PretrainedConfig:
    """A Llama of any size with heads of 64 that share no keys."""
    heads = max(1, hidden // 64)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    names = {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary}
    return AutoConfig.for_model("llama", **shape, **names, max_position_embeddings=1 << 20)
