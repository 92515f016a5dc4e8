"""DeepSpeed, without what it warns of at every start, and without MLflow, which its autotuner would import where it is
installed: two seconds, and nothing of it is used here. What speaks with a server of MLflow is
:mod:`fft.training.mlflow_sink`, which imports it itself."""

from fft.hidden_modules import hidden_module
from fft.training.quiet import quiet_libraries

_UNUSED = "mlflow"

quiet_libraries()
with hidden_module(_UNUSED):
    import deepspeed

__all__ = ["deepspeed"]
