"""The trainer in fp16 on CPU, where torch has the operators but DeepSpeed, without hardware for it, refuses.

The last word of the command line is the power of two that the loss scale begins with.
"""

import sys

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from fft.train import cli
from fft.training import engine

if __name__ == "__main__":
    CPU_Accelerator.is_fp16_supported = lambda self: True
    settings, power = engine.deepspeed_config, int(sys.argv.pop())
    scaled = {"enabled": True, "initial_scale_power": power, "hysteresis": 1}
    engine.deepspeed_config = lambda *given: settings(*given) | {"fp16": scaled}
    cli()
