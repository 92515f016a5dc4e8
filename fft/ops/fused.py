"""RMSNorm, rotary embedding and SwiGLU as one kernel each, in place of transformers' chains of small ones.

On NVIDIA GPUs they are those of Liger (arXiv:2410.10989) where it is installed, on Ascend those of torch_npu; else
the model runs as transformers wrote it. Parameters keep their names. (transformers' own way to such kernels
downloads them from the Hugging Face Hub, which many clusters cannot reach, and has no rotary embedding to train with.)

Liger's kernels ran in Triton's interpreter on a CPU; torch_npu's calls are checked against its published schemas.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fft.errors import UserError
from fft.ops.compare import disagreement

#: Model types whose norms, rotary embedding and dense MLPs are Llama's. Experts keep their own SwiGLU.
FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}


@dataclass(frozen=True)
class FusedOps:
    """Differentiable operators, whose forward leaves its inputs as they are; shapes as in transformers.

    ``rms_norm(x, weight, epsilon)``: the last dimension of ``x``, weighted after it was rounded to its dtype.
    ``rotary(q, k, cos, sin)``: q, k [1, heads, tokens, head size]; cos, sin [1, tokens, head size].
    ``swiglu(gate, up)``: silu(gate) * up.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]


def fused_ops(device: str, choice: str = "auto") -> FusedOps | None:
    """Those of a type of device; None where it has none, nothing is installed, or ``choice`` is none."""
    if choice == "auto" and device == "npu":
        return npu_ops()
    if choice == "auto" and device == "cuda" and find_spec("liger_kernel"):
        return liger_ops()
    return None


def missing(device: str, choice: str, family: str) -> str | None:
    """What to install for fused operators, and what for, where a model of a type could have them and has not."""
    if device != "cuda" or choice != "auto" or family not in FAMILIES or find_spec("liger_kernel"):
        return None
    return (
        "liger-kernel is not installed: norms, rotary embedding and SwiGLU move three times the bytes, a step of an 8B "
        "model on an H100 should take a tenth longer: pip install liger-kernel"
    )


def liger_ops() -> FusedOps:
    """Liger's. Its norm would keep memory down by writing over gradients that others may still need: not here."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # It turns q and k where they are, unseen by autograd. Selective recomputation keeps these very products, and
        # would turn them again.
        return liger_rope(q.clone(), k.clone(), cos, sin)

    return FusedOps("liger", partial(liger_rms_norm, in_place=False), rotary, liger_swiglu)


def npu_ops() -> FusedOps:
    """Ascend's."""
    import torch_npu

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch_npu.npu_rotary_mul(q, cos, sin), torch_npu.npu_rotary_mul(k, cos, sin)

    return FusedOps(
        "npu",
        lambda x, weight, epsilon: torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0],
        rotary,
        lambda gate, up: torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1),
    )


def plain_ops() -> FusedOps:
    """The formulas, as transformers computes them: what others are compared with."""

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

        return turned(q), turned(k)

    return FusedOps("plain", rms_norm, rotary, lambda gate, up: nn.functional.silu(gate) * up)


def fuse(model: PreTrainedModel, ops: FusedOps) -> None:
    """Let the modules of a model of :data:`FAMILIES` compute with ``ops``; leave any other as it is."""
    decoder = model.get_decoder()
    if decoder.config.model_type not in FAMILIES:
        return
    for module in decoder.modules():
        children = set(module._modules)
        if type(module).__name__.endswith("RMSNorm"):
            forward = partial(_rms_norm, ops)
        elif {"gate_proj", "up_proj", "down_proj"} <= children and decoder.config.hidden_act == "silu":
            forward = partial(_mlp, ops)
        elif {"q_proj", "k_proj", "v_proj"} <= children:
            forward = _with_rotary(type(module).forward, ops)
        else:
            continue
        module.forward = MethodType(forward, module)


class _Norm(Protocol):
    weight: Tensor
    variance_epsilon: float


class _GatedMlp(Protocol):
    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]


def _rms_norm(ops: FusedOps, module: _Norm, hidden_states: Tensor) -> Tensor:
    return ops.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(ops: FusedOps, module: _GatedMlp, x: Tensor) -> Tensor:
    return module.down_proj(ops.swiglu(module.gate_proj(x), module.up_proj(x)))


def _with_rotary(forward: FunctionType, ops: FusedOps) -> FunctionType:
    """An attention module's forward for which the global ``apply_rotary_pos_emb`` is ours, and for nobody else."""
    names = {**forward.__globals__, "apply_rotary_pos_emb": ops.rotary}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def check_operators(ops: FusedOps, device: torch.device, dtype: torch.dtype) -> None:
    """Compare with the formulas in float64, forward and backward. Raises :class:`UserError` if they differ or fail."""
    wrong = disagreement(_results(ops, device, dtype), dtype, "fail", "differ from their formulas")
    if wrong:
        raise UserError(
            f"the fused operators of {ops.name} on {device} in {str(dtype).removeprefix('torch.')} {wrong}; "
            "use --fused_ops none."
        )


def _results(ops: FusedOps, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every output and gradient: its operator's name, what ``ops`` compute, and what the formulas do."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.rand(1, 30, 32, generator=generator).repeat(1, 1, 2)  # as kernels may rely on, halves are equal
    cases = {
        "rms_norm": ([(1, 30, 256), (256,)], (1e-6,)),
        "rotary": ([(1, 4, 30, 64), (1, 2, 30, 64)], (turn.cos(), turn.sin())),
        "swiglu": ([(1, 30, 256), (1, 30, 256)], ()),
    }
    for name, (shapes, constants) in cases.items():
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        constants = [x.to(device, dtype) if isinstance(x, Tensor) else x for x in constants]
        results = []
        for tested, convert in ((ops, lambda x: x), (plain_ops(), lambda x: x.double().cpu())):
            leaves = [convert(x).clone().requires_grad_() for x in inputs]
            rest = [convert(x) if isinstance(x, Tensor) else x for x in constants]
            given = [x * 1 for x in leaves]  # kernels may write over what is no leaf
            outputs = getattr(tested, name)(*given, *rest)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.stack([(x.double() * x.double().detach().sin()).sum() for x in outputs]).sum().backward()
            results.append([x.detach() for x in (*outputs, *(x.grad for x in leaves))])
        yield from ((name, ours, theirs) for ours, theirs in zip(*results, strict=True))
