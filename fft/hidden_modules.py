"""Imports that a library would make, at a cost, where nothing of them is used."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Have the imports of a module, that nobody has imported yet, fail as where it is not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyrefly: ignore[unsupported-operation]  # documented: import raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[name]
