"""What DeepSpeed's engine is told of a run."""

from fft.arguments import TrainArguments
from fft.planning.memory import ZERO_BUCKET


def deepspeed_config(args: TrainArguments, stage: int) -> dict:
    """Of a run with this ``stage`` of ZeRO."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if args.offload_optimizer else {}
    clips = args.dtype == "bf16" and not args.offload_optimizer  # our optimizer does, as it does without ZeRO
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm if stage and not clips else 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": ZERO_BUCKET, **offload},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Each gradient is added to its fp32 sum, and gone, as soon as backward has made it.
        "bf16": {"enabled": args.dtype == "bf16", "immediate_grad_update": True},
        "fp16": {"enabled": args.dtype == "fp16"},  # with a dynamic loss scale, the defaults
        # bf16 gradients summed in bf16, over micro-batches or over replicas, would lose most of their digits.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp16" if args.dtype == "fp16" else "fp32",
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, where it counts
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
