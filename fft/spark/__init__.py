"""From a notebook to the machines of a Spark cluster: one call trains on its executors.

>>> from fft.spark import train_on_cluster
>>> result = train_on_cluster(
...     model="runs/base", train_data="runs/packed/train", seq_len=2048, checkpoint="runs/run", nodes=2, processes=4
... )  # doctest: +SKIP
>>> result.plot().save("loss.svg")  # doctest: +SKIP

The one place of :mod:`fft` that knows pyspark, which it imports when a run on executors begins.
"""

from importlib import import_module

_HOMES = {"Result": "cluster", "train_on_cluster": "cluster"}

__all__ = ["Result", "train_on_cluster"]


def __getattr__(name: str) -> object:
    """Import a name's module when it is first asked for: what runs on executors needs none of these."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
