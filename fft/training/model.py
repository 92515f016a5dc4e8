"""The model of a run: what its flags ask for, with the kernels of its device."""

from transformers import PretrainedConfig

from fft.arguments import TrainArguments
from fft.images.rules import ImageRules
from fft.models.compiled import compiler_of
from fft.models.lora import Lora
from fft.models.spec import DTYPES, ModelSpec
from fft.ops import fused
from fft.planning.objective import check_balance
from fft.training.engine import device_type


def model_spec(args: TrainArguments, config: PretrainedConfig, images: ImageRules | None = None) -> ModelSpec:
    """The model, with the kernels asked for, and the rules of the ``images`` that it is to see.

    Raises :class:`UserError` for names that it does not have, and for a loss of its own where preferences are learned.
    """
    operators = None if args.compile else fused.fused_ops(device_type(), args.fused_ops)
    train = {"lora": Lora.of(args), "frozen": args.freeze, "selective": args.checkpoint_grad_selective}
    compiler = compiler_of(device_type()) if args.compile else None
    spec = ModelSpec(
        config,
        DTYPES[args.dtype],
        args.seed,
        args.attention,
        operators,
        **train,
        compiler=compiler,
        images=images,
        shared_tower=args.encoder_pipe_parallel_size == 0,
        four_bits=args.load_in_4bit,
    )
    check_balance(args, spec.routing is not None and spec.routing.coefficient > 0)
    return spec
