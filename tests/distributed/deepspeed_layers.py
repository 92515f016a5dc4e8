"""Save a model as DeepSpeed's pipeline engine does, for ``test_resume.py``: flags of the trainer, then the folder."""

import sys

from fft.arguments import parse_arguments
from fft.models.causal_lm import StageBuilder
from fft.models.spec import DTYPES, ModelSpec
from fft.planning.layout import plan_layout
from fft.planning.preflight import plan_run
from fft.training.engine import build_engine, init_distributed, on_host

if __name__ == "__main__":
    args = parse_arguments(sys.argv[1:-1])
    plan = plan_run(args, 1)
    spec = ModelSpec(plan.config, DTYPES[args.dtype], args.seed)
    init_distributed()
    layout = plan_layout(args, spec, plan.mesh, on_host())
    engine = build_engine(args, StageBuilder(spec, weights=plan.weights), plan.mesh, layout.bounds, 1)
    engine.deepspeed.save_checkpoint(sys.argv[-1], tag="global_step0")
