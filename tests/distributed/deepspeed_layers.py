"""Save a model as DeepSpeed's pipeline engine does, for ``test_resume.py``: flags of the trainer, then the folder."""

import sys

from fft.arguments import parse_arguments
from fft.models.causal_lm import ModelSource
from fft.planning.layout import plan_layout
from fft.planning.preflight import plan_run
from fft.training.engine import DTYPES, build_engine, init_distributed, on_host

if __name__ == "__main__":
    args = parse_arguments(sys.argv[1:-1])
    plan = plan_run(args, 1)
    source = ModelSource(plan.config, DTYPES[args.dtype], plan.weights, args.seed)
    init_distributed()
    layout = plan_layout(args, source, plan.mesh, on_host())
    engine, _ = build_engine(args, source, plan.mesh, layout.bounds, 1)
    engine.save_checkpoint(sys.argv[-1], tag="global_step0")
