"""``--adapter_name_or_path``: the adapter that training goes on with, and what it says of a run's flags."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fft.arguments import TrainArguments
from fft.checkpoint.adapter import CONFIG, AdapterReader, read_config, scale_of
from fft.errors import UserError
from fft.models.lora import DOWN, Lora
from fft.models.vision import PARTS
from fft.planning.preflight import local


def with_adapter(args: TrainArguments) -> TrainArguments:
    """The arguments with what the adapter of ``--adapter_name_or_path`` says of them; without one as they are.

    Dropout is a matter of how it is trained, and remains the flag's. Raises :class:`UserError` for an adapter that is
    more than LoRA or DoRA, and for flags that say another thing.
    """
    if not args.adapter_name_or_path:
        return args
    given = f"--adapter_name_or_path {args.adapter_name_or_path}"
    directory = Path(local(args.adapter_name_or_path))
    if not os.path.isdir(directory):  # where pathlib raises, as for a name that is too long, it is none either
        raise UserError(f"{given} is no directory: give one that PEFT or a run saved, which has an {CONFIG}.")
    config = read_config(directory)
    scale_of(config, given)
    alpha, modules = config["lora_alpha"], _modules(AdapterReader(directory), given)
    if alpha != int(alpha) or config.get("fan_in_fan_out"):
        what = "fan_in_fan_out" if alpha == int(alpha) else f"a lora_alpha of {alpha}, which is no whole number"
        raise UserError(f"{given} has {what}: merge it into the model first, and begin a new one by --lora_dim.")
    says = {
        "lora_dim": config["r"],
        "lora_alpha": int(alpha),
        "lora_module_name": ",".join(modules),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
    }
    for name, value in says.items():
        flag = getattr(args, name)
        if flag != getattr(TrainArguments, name) and _compared(flag) != _compared(value):
            raise UserError(
                f"--{name} {flag}: {given} has {value}; leave the flag out, since an adapter that goes on is as it was."
            )
    if _compared(args.lora_module_name) == modules:
        del says["lora_module_name"]
    return replace(args, **says)


def told_start(args: TrainArguments) -> str:
    """A line about the adapter of a run whose arguments :func:`with_adapter` gave."""
    lora, place = Lora.of(args), str(args.adapter_name_or_path)
    if lora is None:
        raise ValueError("a run without adapters goes on with none")
    base = read_config(Path(local(place))).get("base_model_name_or_path")
    kind = "DoRA" if lora.dora else "LoRA"
    return (
        f"goes on with the adapter in {place}: {kind} of rank {lora.rank}, multiplied by {lora.scale:.3g}, on "
        f"{', '.join(sorted(lora.modules))}; made for {base or 'a model that it does not name'}"
    )


def _modules(adapter: AdapterReader, given: str) -> list[str]:
    """What has matrices in a file, as ``--lora_module_name`` calls it. Raises :class:`UserError` where nothing has."""
    parts = {part.rpartition(".")[2] for own in PARTS.values() for part in own}
    found = set()
    for name in adapter.names:
        *path, matrix = name.removesuffix(".weight").split(".")
        if matrix == DOWN and path:
            part = next((part for part in path if part in parts), None)
            found.add(path[-1] if part is None else f"{part}.{path[-1]}")
    if not found:
        raise UserError(f"{given} has no matrix called {DOWN}, as LoRA has: save it again by PEFT.")
    return sorted(found)


def _compared(value: Any) -> Any:
    """Names in any order."""
    return sorted(name.strip() for name in value.split(",")) if isinstance(value, str) else value
