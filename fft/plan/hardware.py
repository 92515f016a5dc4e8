"""Machines: devices, and the links inside and between nodes, as files of ``conf/hardware`` describe them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from fft.errors import UserError, one_line
from fft.json_text import small_text
from fft.plan.constants import FITTED_CONSTANTS, Constants
from fft.yaml_text import yaml_value

#: Files of machines, where there is a checkout.
HARDWARE = Path(__file__).parents[2] / "conf" / "hardware"

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
#: No rate, size or time of a machine is larger, in any unit: floats do not end there.
_MOST = 1e15
#: Constants that may be 0.
_ZERO = ("launch", "tile", "row", "beside", "straggler", "host")
#: Numbers of devices; shares of a rate, which a busy machine's measurement may put above 1, and percents are far above.
_WHOLE, _SHARES, _MOST_OF_A_RATE = ("sharing",), ("reached", "flash_forward", "flash_backward"), 10.0


@dataclass(frozen=True)
class Device:
    """``peak`` FLOP/s of 16-bit matrix products by the datasheet, ``reached`` the share that large products reach.

    ``bandwidth`` B/s of its memory by the datasheet, ``memory`` bytes of it; ``flash`` the shares of ``peak`` that
    the attention kernel reaches in forward and backward on long documents. ``wide`` is the peak of 32-bit products,
    half of the other where a file does not say. ``attention`` are rates by the length of a document, as (tokens,
    forward, backward) in FLOP/s, where they were measured. ``cpu`` says whether the device is the machine's processor,
    whose operators are those of PyTorch, one by one.
    """

    name: str
    peak: float
    reached: float
    bandwidth: float
    memory: float
    flash: tuple[float, float]
    wide: float
    cpu: bool = False
    attention: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Link:
    """``bandwidth`` B/s in one direction, of a device inside a node, of a whole node between nodes.

    ``latency`` seconds of an exchange; of devices inside, ``sharing`` have one bandwidth together when all send.
    """

    bandwidth: float
    latency: float
    sharing: int = 1


@dataclass(frozen=True)
class Machine:
    """Nodes of ``node`` devices each; ``at`` are the constants of all machines, but for those that a file has."""

    name: str
    device: Device
    node: int
    inside: Link
    between: Link
    at: Constants = FITTED_CONSTANTS


def read_machine(path: str | Path) -> Machine:
    """A machine as a file describes it, in TFLOP/s, GB/s, GB and microseconds.

    Raises :class:`UserError` for what is no such file.
    """
    try:
        said = yaml_value(small_text(path))
    except OSError as error:
        raise UserError(f"--hardware {path}: {error.strerror}; conf/hardware has files to begin with.") from None
    except ValueError as error:
        raise UserError(f"--hardware {path} cannot be read ({one_line(error)}): restore it.") from error
    if not isinstance(said, dict):
        raise UserError(f"--hardware {path}: device, node, inside and between were expected, as in conf/hardware.")
    rates = "tflops", "reached", "bandwidth", "memory", "flash_forward", "flash_backward"
    device = _numbers(path, said, "device", rates, ("tflops_fp32",), words=("kind", "attention"))
    inside = _numbers(path, said, "inside", ("bandwidth", "latency"), ("sharing",))
    between = _numbers(path, said, "between", ("bandwidth", "latency"))
    node = said.get("node")
    if not isinstance(node, int) or isinstance(node, bool) or not 1 <= node <= _MOST:
        raise UserError(f"--hardware {path}: node must be how many devices a node has.")
    _check_keys(path, "", said, {"name", "node", "device", "inside", "between", "constants"})
    kind = said["device"].get("kind", "gpu")
    if kind not in ("cpu", "gpu", "npu"):
        raise UserError(f"--hardware {path}: device.kind must be cpu, gpu or npu, not {kind!r}.")
    own: dict[str, float] = {}
    if "constants" in said:
        own = _numbers(path, said, "constants", (), tuple(field.name for field in fields(Constants)), zero=_ZERO)
    return Machine(
        str(said.get("name", Path(path).stem)),
        Device(
            str(said["device"].get("name", Path(path).stem)),
            device["tflops"] * _TERA,
            device["reached"],
            device["bandwidth"] * _GIGA,
            device["memory"] * _GIGA,
            (device["flash_forward"], device["flash_backward"]),
            device.get("tflops_fp32", device["tflops"] / 2) * _TERA,
            kind == "cpu",
            _attention(path, said["device"].get("attention", [])),
        ),
        node,
        Link(inside["bandwidth"] * _GIGA, inside["latency"] * _MICRO, int(inside.get("sharing", 1))),
        Link(between["bandwidth"] * _GIGA, between["latency"] * _MICRO),
        replace(FITTED_CONSTANTS, **own),
    )


def _attention(path: str | Path, said: object) -> tuple[tuple[float, float, float], ...]:
    """Rates by length, the shortest first, in FLOP/s."""
    rows = said if isinstance(said, list) else [said]
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(_is_number(x) and x > 0 for x in row):
            raise UserError(
                f"--hardware {path}: device.attention must be a list of [tokens, TFLOP/s forward, TFLOP/s backward], "
                f"not {said!r}."
            )
    return tuple(sorted((float(n), forward * _TERA, backward * _TERA) for n, forward, backward in rows))


def named_link(name: str) -> Link:
    """A link of ``conf/hardware/links.yaml``. Raises :class:`UserError` for a name that it has not."""
    path = HARDWARE / "links.yaml"
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(f"--compare {name}: {path.name} has {', '.join(known)}.")
    said = _numbers(path, known, name, ("bandwidth", "latency"), ("sharing",))
    return Link(said["bandwidth"] * _GIGA, said["latency"] * _MICRO, int(said.get("sharing", 1)))


def _numbers(
    path: str | Path,
    said: dict,
    part: str,
    names: tuple[str, ...],
    more: tuple[str, ...] = (),
    *,
    words: tuple[str, ...] = (),
    zero: tuple[str, ...] = (),
) -> dict[str, float]:
    """Those of a part that it must have, and ``more`` that it may have beside ``words``; those of ``zero`` may be 0."""
    own = said.get(part)
    if not isinstance(own, dict):
        raise UserError(f"--hardware {path}: {part} is missing: {', '.join(names or more)}.")
    _check_keys(path, f"{part}.", own, {"name", *names, *more, *words})
    for name in names + tuple(name for name in more if name in own):
        value = own.get(name)
        if not _is_number(value) or value < 0 or (value == 0 and name not in zero) or (name in _WHOLE and value % 1):
            least = "of at least 0" if name in zero else "above 0"
            least += " and whole" if name in _WHOLE else ""
            raise UserError(f"--hardware {path}: {part}.{name} must be a number {least}, not {value!r}.")
        if name in _SHARES and value > _MOST_OF_A_RATE:
            raise UserError(f"--hardware {path}: {part}.{name} is a share, such as 0.8, not {value!r}.")
    return {name: float(own[name]) for name in names + more if name in own}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST  # NaN is not


def _check_keys(path: str | Path, prefix: str, said: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(str, set(said) - known)):
        raise UserError(f"--hardware {path}: {prefix}{unknown[0]} is not known; there are {', '.join(sorted(known))}.")
