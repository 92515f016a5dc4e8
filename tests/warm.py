"""What every rank would import, or find out, as it starts: done once, where the ranks of tests are forked from."""

import importlib

import deepspeed

for name in (
    "fft.training.trainer",
    "torch.utils.tensorboard",
    # What DeepSpeed imports, with torch's compiler, when it makes an optimizer and an engine.
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
):
    importlib.import_module(name)
# Asked for this, DeepSpeed tries a C compiler, and keeps what it finds.
possible = deepspeed.ops.__compatible_ops__
