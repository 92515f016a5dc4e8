"""What a layout costs on given machines, before anyone books them: arithmetic, no device, no weights.

>>> from fft.plan import find_layouts  # what python -m fft.plan prints, for a notebook
"""

from importlib import import_module

__all__ = ["FoundLayouts", "find_layouts"]


def __getattr__(name: str) -> object:
    """Import when it is asked for: ``--help`` needs little of this."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.found"), name)
