"""Flags from a dataclass: one field is a flag of the command line, a key of a YAML file, and an attribute.

A field made by :func:`flag` carries its meaning, its choices and its bound; the type is the annotation's. Nothing here
knows which flags there are.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from fft.errors import UserError


@dataclass(frozen=True)
class Bound:
    """What a number must be: the sentence's end for a user, and the test."""

    sentence: str
    holds: Callable[[float], bool]


AT_LEAST_1 = Bound("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Bound("must not be negative", lambda value: value >= 0)
BELOW_1 = Bound("must be at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE_OF_STEPS = Bound("must be a share of all steps, from 0 to 1", lambda value: 0 <= value <= 1)
_FINITE = Bound("must be a finite number", math.isfinite)


def flag(
    help: str,
    default: Any = MISSING,
    *,
    topic: str | None = None,
    choices: tuple[str, ...] | None = None,
    bound: Bound | None = None,
) -> Any:
    """A dataclass field that is a flag. With ``topic`` it opens a group of ``--help``, to which those below belong."""
    return field(default=default, metadata={"help": help, "topic": topic, "choices": choices, "bound": bound})


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add the flags of the dataclass ``kind``, in groups by topic; booleans take no value."""
    group: argparse._ActionsContainer = parser
    for spec in fields(kind):
        text, choices = spec.metadata["help"], spec.metadata["choices"]
        if spec.metadata["topic"]:
            group = parser.add_argument_group(spec.metadata["topic"])
        if spec.type is bool:
            group.add_argument(f"--{spec.name}", action="store_true", help=text)
            continue
        if spec.default not in (None, MISSING):
            text += f" (default: {spec.default})"
        group.add_argument(
            f"--{spec.name}",
            type=_plain_type(spec),
            choices=choices,
            metavar=None if choices else spec.name.rsplit("_", 1)[-1].upper(),
            help=text,
        )


def read_settings(path: str, kind: type) -> dict[str, Any]:
    """The flags of the dataclass ``kind`` that a YAML file (``--config``) sets, each of its field's type.

    Raises :class:`UserError` for a file that is none, and for what is no flag, of another type or no choice of it.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path} does not exist.")
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"--config {path} must map flag names to values.")
    known = {spec.name: spec for spec in fields(kind)}
    return {name: _typed(path, known, name, value) for name, value in raw.items()}


def check_bounds(arguments: Any) -> None:
    """Raise :class:`UserError` for the first flag of the dataclass ``arguments`` that is infinite or out of bounds."""
    for spec in fields(arguments):
        value, bound = getattr(arguments, spec.name), spec.metadata["bound"]
        for wanted in (_FINITE if spec.type is float else None, bound):
            if wanted is not None and not wanted.holds(value):
                raise UserError(f"--{spec.name} {value} {wanted.sentence}.")


def _typed(path: str, known: Mapping[str, Field], name: str, value: object) -> object:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise UserError(f"--config {path}: unknown setting {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}.")
    spec = known[name]
    kind, choices = _plain_type(spec), spec.metadata["choices"]
    try:
        converted = None if value is None and spec.default is None else _converted(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"--config {path}: {name} must be of type {kind.__name__}, not {value!r}.") from None
    if choices and converted not in choices:
        raise UserError(f"--config {path}: {name} must be one of {', '.join(choices)}, not {value!r}.")
    return converted


def _converted(value: Any, kind: type) -> object:
    """A YAML scalar as the type of its flag; YAML 1.1 reads 1e-4 as a string. Raises where the two do not fit."""
    if value is None or isinstance(value, (list, dict)) or isinstance(value, bool) != (kind is bool):
        raise ValueError
    converted = kind(value)
    if kind is int and float(value) != converted:
        raise ValueError
    return converted


def _plain_type(spec: Field) -> type:
    """``str | None`` -> str."""
    return spec.type if isinstance(spec.type, type) else get_args(spec.type)[0]
