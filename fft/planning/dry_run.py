"""``--dry_run``: the layout of a run, printed without the run: no ranks, no weights, no tables, no device."""

import os

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.models.spec import DTYPES, ModelSpec
from fft.planning.layout import Layout, describe, plan_layout
from fft.planning.preflight import lay_out


def dry_run(args: TrainArguments) -> int:
    """Print the layout of ``--ranks``. Raises :class:`UserError` where it is impossible, or exceeds the device."""
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    config, mesh = lay_out(args, args.ranks or int(os.environ.get("WORLD_SIZE", "1")))
    layout = plan_layout(args, ModelSpec(config, DTYPES[args.dtype]), mesh, host=False)
    print(describe(args, config.model_type, layout))
    if args.device_memory:
        check_fits(layout, args.device_memory)
    return 0


def check_fits(layout: Layout, gigabytes: float) -> None:
    """Raise :class:`DoesNotFit` where the fullest stage exceeds a device of so many GB."""
    totals = [memory.total for memory in layout.memory]
    stage = totals.index(max(totals))
    if totals[stage] > gigabytes * 1e9:
        raise DoesNotFit(
            f"stage {stage} needs {totals[stage] / 1e9:.1f} GB a rank, more than --device_memory {gigabytes:g}: use "
            "more stages or tensor-parallel ranks, --checkpoint_grad_interval 1, or --partition_method mem."
        )


class DoesNotFit(UserError):
    """A layout that is possible, on larger devices."""

    exit_code = 1
