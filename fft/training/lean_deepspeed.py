"""DeepSpeed, without what it warns of at every start, and without MLflow, which its autotuner would import where it is
installed: two seconds, and nothing of it is used here. What speaks with a server of MLflow is
:mod:`fft.training.mlflow_sink`, which imports it itself."""

import contextlib
import sys
from collections.abc import Iterator

from fft.training.quiet import quiet_libraries

_UNUSED = "mlflow"


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Have the imports of a module, that nobody has imported yet, fail as where it is not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyrefly: ignore[unsupported-operation]  # documented: import raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[name]


quiet_libraries()
with _hidden(_UNUSED):
    import deepspeed

__all__ = ["deepspeed"]
