"""Flash Fine Tuning: train large language models straight from the token tables that Spark wrote.

Importing this package is light: no torch, no pyspark.
"""

import os
import sys

__version__ = "0.2.0"


def _leave_current_folder() -> None:
    """Have ``python -m fft...``, and what it starts, take no module from the folder where it happens to run.

    Python puts that first, and a stranger's model may lie there with a ``vllm.py``. It stays where this package itself
    comes from it, or PYTHONPATH names it.
    """
    here = os.getcwd()
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here == os.path.dirname(os.path.dirname(os.path.abspath(__file__))) or here in named:
        return
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or here) != here]
    os.environ["PYTHONSAFEPATH"] = "1"


if sys.argv[:1] == ["-m"]:  # Python looks for the module that it is to run
    _leave_current_folder()
