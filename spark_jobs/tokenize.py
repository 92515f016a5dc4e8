"""Turn text into a token table: ``spark-submit spark_jobs/tokenize.py``. ``--help`` lists the flags.

This file has the name of a module of the standard library. Whenever a script of this folder is the main file, the
folder comes first on ``sys.path``, and ``linecache``, ``inspect`` and others would import this file instead of the
standard one. So as a script it leaves the path before it imports anything; imported as ``tokenize``, it steps aside
and becomes the standard library's module. Imported as ``spark_jobs.tokenize``, it is the transform of that name.
"""

import os
import sys

if __name__ == "tokenize":
    __file__ = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    with open(__file__, "rb") as _source:
        exec(compile(_source.read(), __file__, "exec"), globals())
elif __name__ == "__main__":
    _HERE = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _HERE]
    if os.path.dirname(_HERE) not in sys.path:
        sys.path.insert(0, os.path.dirname(_HERE))

    from fft.errors import run_cli
    from spark_jobs.cli import run_tokenize

    run_cli(run_tokenize)
elif __name__ == "spark_jobs.tokenize":
    from spark_jobs.transforms import tokenize

    sys.modules[__name__] = tokenize  # pyrefly: ignore[unsupported-operation] imports take what they find here
