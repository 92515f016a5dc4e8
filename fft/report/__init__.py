"""A page about a run, for whoever wants to look at it: one HTML file that needs nothing else.

>>> from fft.report import report_on  # what python -m fft.report writes, for a notebook
"""

from importlib import import_module

__all__ = ["Report", "report_on"]


def __getattr__(name: str) -> object:
    """Import when it is asked for: ``--help`` needs little of this."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.shown"), name)
