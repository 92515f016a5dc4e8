"""Flags from a dataclass: one field is a flag of the command line, a key of a YAML file, and an attribute.

A field made by :func:`flag` carries its meaning, its choices and its bound; the type is the annotation's. Nothing here
knows which flags there are.
"""

import argparse
import difflib
import math
import unicodedata
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, get_args

import yaml

from fft.errors import UserError, check_no_credentials, one_line


@dataclass(frozen=True)
class Bound:
    """What a number or a text must be: the sentence's end for a user, and the test."""

    sentence: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Bound("must be at least 1", lambda value: value >= 1)
AT_LEAST_5 = Bound("must be at least 5", lambda value: value >= 5)
FROM_MINUS_1 = Bound("must be at least -1", lambda value: value >= -1)
#: What is added to the root of squared gradients, which are 0 where a parameter has none: 0 / 0 would be its step.
EPSILON = Bound("must be at least 1e-30, or what has no gradient becomes NaN", lambda value: value >= 1e-30)
NOT_NEGATIVE = Bound("must not be negative", lambda value: value >= 0)
BELOW_1 = Bound("must be at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE_OF_STEPS = Bound("must be a share of all steps, from 0 to 1", lambda value: 0 <= value <= 1)
SHARE = Bound("must be a share, more than 0 and at most 1", lambda value: 0 < value <= 1)
_FINITE = Bound("must be a finite number", math.isfinite)
#: What is counted, or shared out, is counted in 32 bits by somebody.
_COUNTS = Bound("must be less than 2,147,483,648", lambda value: value < 1 << 31)
_LINE = Bound(
    "must be a line of text: give one, or leave the flag out",  # Cc: line ends and the like, Cs: bytes of no UTF-8
    lambda text: bool(text.strip()) and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text),
)

#: What all flags of a type must be.
_OF_TYPE = {float: _FINITE, int: _COUNTS, str: _LINE}

#: What stands before the names of YAML's own types; those of scalars that a person writes without naming the type.
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset({"str", "int", "float", "bool", "null", "timestamp", "merge", "value"})
#: Characters of a file of settings, which has fewer.
_LONGEST_FILE = 1 << 20
#: Characters of a setting that a sentence repeats.
_LONGEST = 60


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

    A value means what its text means on the command line: ``007`` is a name of three digits, and ten is not ``0xA``.
    Raises :class:`UserError` for a file that is none, and for what is no flag, set twice, of another type or no choice.
    """
    try:
        with open(path, encoding="utf-8") as stream:  # which may be a pipe
            text = stream.read(_LONGEST_FILE)
        if len(text) == _LONGEST_FILE:
            raise UserError(f"--config {path} has {_LONGEST_FILE:,} letters or more: name a YAML file of settings.")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path} is not YAML: {one_line(error)}.") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path} must map flag names to values.")
    known = {spec.name: spec for spec in fields(kind)}
    found: dict[str, Any] = {}
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _written(key, text)
        where = f"--config {path}, line {key.start_mark.line + 1}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{where}: unknown setting {_short(name)!r}{f' (did you mean {near[0]!r}?)' if near else ''}."
            )
        if name in found:
            raise UserError(f"{where}: {name} is set a second time: keep one of the two.")
        found[name] = _typed(where, known[name], value, text)
    return found


def check_bounds(arguments: Any) -> None:
    """Raise :class:`UserError` for the first flag that is infinite, out of bounds, a text of no or several lines, or
    a URL with credentials."""
    for spec in fields(arguments):
        value, bound = getattr(arguments, spec.name), spec.metadata["bound"]
        if isinstance(value, str):
            check_no_credentials(value)
        for wanted in (_OF_TYPE.get(type(value)), bound):
            if wanted is not None and value is not None and not wanted.holds(value):
                shown = repr(value) if isinstance(value, str) else value
                raise UserError(f"--{spec.name} {shown} {wanted.sentence}.")


def _typed(where: str, spec: Field, value: yaml.Node, text: str) -> object:
    kind, choices = _plain_type(spec), spec.metadata["choices"]
    try:
        converted = None if value.tag == f"{_TAG}null" and spec.default is None else _converted(value, kind)
    except ValueError:
        raise UserError(f"{where}: {spec.name} must be of type {kind.__name__}, not {_written(value, text)}.") from None
    if choices and converted not in choices:
        raise UserError(f"{where}: {spec.name} must be one of {', '.join(choices)}, not {_written(value, text)}.")
    return converted


def _converted(value: yaml.Node, kind: type) -> object:
    """A scalar as the type of its flag, made of its text. Raises :class:`ValueError` where the two do not fit."""
    known = isinstance(value, yaml.ScalarNode) and value.tag.removeprefix(_TAG) in _SCALARS
    if not known or (value.tag == f"{_TAG}bool") != (kind is bool):
        raise ValueError
    if kind is not bool:
        return kind(value.value)
    if value.value.lower() not in yaml.SafeLoader.bool_values:
        raise ValueError
    return yaml.SafeLoader.bool_values[value.value.lower()]


def _written(node: yaml.Node, text: str) -> str:
    """A node as it stands in the file, fit for a sentence; a text in quotes."""
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
        return repr(_short(node.value))
    return _short(" ".join(text[node.start_mark.index : node.end_mark.index].split())) or "nothing"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _plain_type(spec: Field) -> type:
    """``str | None`` -> str."""
    return spec.type if isinstance(spec.type, type) else get_args(spec.type)[0]
