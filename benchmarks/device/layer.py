"""A decoder layer's forward and backward: eager, with fused operators, compiled, and as a CUDA graph.

A graph holds what a launch was given: the tensors' addresses and the numbers that the host knows, here the number of
documents and the tokens of the longest. Boundaries are a tensor, so a graph made for 64 documents of at most a row's
tokens (those that are not there are empty) serves every row of that length with up to 64: that is measured, too. The
compiled layer is one graph, as ``--compile`` makes it, in which attention is an operator that is not looked into.
"""

import functools
import itertools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.device.frame import Cases, Row, Setting, free, milliseconds, peak_bytes
from benchmarks.device.hardware import matrix_rate
from benchmarks.device.shapes import model_config
from benchmarks.engines import Noise
from fft.models.causal_lm import StageBuilder
from fft.models.compiled import compiler_of
from fft.models.rotary import Rotary
from fft.models.spec import ModelSpec
from fft.ops.backends.choice import choose
from fft.ops.documents import Documents
from fft.ops.fused import fused_ops
from fft.planning.costs import layer_costs

#: Documents that a graph for any row has room for.
_ROOM = 64
WAYS = ("eager", "fused", "compiled", "graph", "fused graph", "fused graph, any documents")
ROWS = {"8B": (8192, 2048, 512, 32768), "1B": (2048, 512)}
SMALLEST = {"8B": (64,)}


def cases(setting: Setting) -> Cases:
    """Each way at each length."""
    for shape, rows in (SMALLEST if setting.smallest else ROWS).items():
        for row, way in itertools.product(rows, WAYS):
            yield f"{shape}, {row} tokens, {way}", functools.partial(measure, setting, shape, row, way)


class Layer(nn.Module):
    """One decoder layer on one row, whose documents it knows: hidden states [1, tokens, hidden size] in and out."""

    def __init__(self, setting: Setting, shape: str, bounds: tuple[int, ...], fused: bool, compiled: bool) -> None:
        super().__init__()
        config, device = model_config(shape, setting.smallest), setting.device
        operators = fused_ops(device.type) if fused else None
        self.spec = ModelSpec(config, torch.bfloat16, fused=operators)
        builder = StageBuilder(self.spec, weights=Noise(self.spec))
        self.module = builder.build("model.layers.0").to(device)
        # Tensors that the layer reads: another row's are copied into them.
        documents = Documents.of(bounds, device)
        self.documents = documents.boundaries if compiled else documents
        self.positions = documents.positions()[None]
        hidden = torch.empty(1, bounds[-1], config.hidden_size, dtype=torch.bfloat16, device=device)
        rotary = Rotary(self.spec.skeleton, device)
        self.rotary = rotary.turns(hidden, self.positions, rotary.kind(0))
        choose(device, hidden.dtype, size=self.spec.head_size)  # compared with the reference now, not while captured

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        return self.module(
            hidden,
            attention_mask=None,
            position_ids=self.positions,
            position_embeddings=self.rotary,
            documents=self.documents,
        )


def measure(setting: Setting, shape: str, tokens: int, way: str) -> list[Row]:
    """Time of a way, and how far its results are from the eager layer's."""
    told: Row = {"model": shape, "tokens": str(tokens), "way": way}
    why = lacking(setting.device, way)
    if why:
        return [told | {"note": why}]
    bounds = (0, tokens)
    if way.endswith("any documents"):
        bounds += (tokens,) * (_ROOM - 1)
    generator = torch.Generator(setting.device).manual_seed(0)
    config = model_config(shape, setting.smallest)
    hidden, grad = torch.randn(2, 1, tokens, config.hidden_size, generator=generator, device=setting.device).bfloat16()
    hidden.requires_grad_()
    expected = passes(Layer(setting, shape, (0, tokens), False, False), hidden, grad)()
    layer = Layer(setting, shape, bounds, way.startswith("fused"), way == "compiled")
    cost = layer_costs(layer.spec, tokens)[1].flops
    run = prepared(layer, hidden, way)
    once = passes(run, hidden, grad)
    away = max(distance(ours, theirs) for ours, theirs in zip(once(), expected, strict=True))
    del expected
    free(setting.device)  # the maximum is this way's
    spent = milliseconds(once, setting.device, 3 if setting.smallest else 20)
    forward = milliseconds(lambda: run(hidden), setting.device, 3 if setting.smallest else 20)
    rate = 6.0 * cost * tokens / spent * 1e3
    told |= {"forward ms": forward, "both ms": spent, "TFLOP/s": rate / 1e12}
    told |= {"of matrix rate %": 100 * rate / matrix_rate(setting), "differs by": f"{away:.1e}"}
    if way == "compiled":
        torch._dynamo.reset()
    note = {"note": "traced, not compiled"} if way == "compiled" and setting.device.type == "cpu" else {}
    return [told | {"peak GB": peak_bytes(setting.device) / 1e9} | note]


def passes(run: nn.Module, hidden: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a layer; they give its output and the gradients of hidden states and parameters."""
    parameters = list(run.parameters())

    def once() -> tuple[Tensor, ...]:
        out = run(hidden)
        return out.detach(), *torch.autograd.grad(out, [hidden, *parameters], grad)

    return once


def prepared(layer: Layer, hidden: Tensor, way: str) -> nn.Module:
    """The layer, compiled or captured."""
    if way == "compiled":
        layer.compile(fullgraph=True, backend=compiler_of(hidden.device.type))
    if "graph" in way:
        # Captured on other memory than it will be given, as in training, so that its input is copied.
        return torch.cuda.make_graphed_callables(layer, (hidden.detach().clone().requires_grad_(),))
    return layer


def lacking(device: torch.device, way: str) -> str | None:
    """Why a way cannot be taken on a device."""
    if "graph" in way and device.type != "cuda":
        return f"not on {device.type}"
    if way.startswith("fused") and fused_ops(device.type) is None:
        return "no fused operators installed" if device.type == "cuda" else f"not on {device.type}"
    if way == "compiled" and device.type == "cuda" and not find_spec("triton"):
        return "triton is not installed"
    return f"not on {device.type}" if way == "compiled" and device.type not in ("cpu", "cuda") else None


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Of two tensors, relative to the second's norm."""
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).norm() / theirs.norm())
