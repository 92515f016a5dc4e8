"""Signatures that packages publish, kept in ``schemas/``: what a call to a stand-in has to fit."""

import inspect
from pathlib import Path

SCHEMAS = Path(__file__).parent / "schemas"


def signatures(file: str) -> dict[str, inspect.Signature]:
    """The functions of a file of ``def name(arguments): ...`` lines."""
    names: dict = {}
    exec((SCHEMAS / file).read_text(), names)
    return {name: inspect.signature(function) for name, function in names.items() if inspect.isfunction(function)}


def bound(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """Every argument of a call by name, defaults included. Raises TypeError where the call does not fit."""
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments
