"""``--dry_run``: the layout of a run, printed without the run: no ranks, no weights, no device, of tables no more than
what their manifests say of images."""

import os

from transformers import PretrainedConfig

from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.images.rules import ImageRules
from fft.models.spec import DTYPES, ModelSpec
from fft.models.vision import PARTS, rules_of
from fft.planning.image_load import SHARE, ImageLoad, assumed_load, load_of, manifests_of
from fft.planning.layout import Layout, describe, plan_layout
from fft.planning.preflight import check_encoder_stages, lay_out
from fft.planning.start_adapter import with_adapter


def dry_run(args: TrainArguments) -> int:
    """Print the layout of ``--ranks``. Raises :class:`UserError` where it is impossible, or exceeds the device."""
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    args = with_adapter(args)
    layout, told = planned(args, args.ranks or int(os.environ.get("WORLD_SIZE", "1")))
    print(told)
    if args.device_memory:
        check_fits(layout, args.device_memory)
    return 0


def planned(args: TrainArguments, ranks: int) -> tuple[Layout, str]:
    """The layout of so many ranks, and what there is to say of it. Raises :class:`UserError` where it is impossible."""
    config, mesh = lay_out(args, ranks)
    images, load = seen_images(args, config)
    spec = ModelSpec(config, DTYPES[args.dtype], images=images, shared_tower=args.encoder_pipe_parallel_size == 0)
    layout = plan_layout(args, spec, mesh, host=False, load=load)
    return layout, describe(args, config.model_type, layout)


def seen_images(args: TrainArguments, config: PretrainedConfig) -> tuple[ImageRules | None, ImageLoad | None]:
    """What the run would see of images, and what these weigh: as its flags say or, without such, its tables.

    Raises :class:`UserError` for flags of images that the model does not see, and for tables that cannot be read.
    """
    if config.model_type not in PARTS:
        if args.image_tokens is not None:
            raise UserError(f"--image_tokens: a {config.model_type} sees no images; leave it out.")
        check_encoder_stages(args, config, None)
        return None, None
    share, rules, load = args.image_tokens, None, None
    unknown = rules_of(config, ImageRules("", 0, 0, 0, 0, 0, 0))
    manifests = manifests_of(args.train_data) if args.train_data and share is None else []
    if any(manifest is not None and manifest.vision is not None for manifest in manifests):
        rules, load = unknown, load_of(args, unknown, manifests)
    elif share is not None or (args.encoder_pipe_parallel_size and not manifests):
        rules, load = unknown, assumed_load(unknown, args.seq_len, SHARE if share is None else share)
    check_encoder_stages(args, config, rules)
    return rules, load


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
