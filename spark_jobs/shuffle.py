"""Mix token tables into one seeded global order: ``spark-submit spark_jobs/shuffle.py``. ``--help`` lists the flags."""

import os
import sys

if __name__ == "__main__":
    # As a script, this folder is the first place Python looks for modules, and its tokenize.py would shadow the
    # standard library's. The repository's root takes its place.
    _HERE = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _HERE]
    if os.path.dirname(_HERE) not in sys.path:
        sys.path.insert(0, os.path.dirname(_HERE))

    from fft.errors import run_cli
    from spark_jobs.cli import run_shuffle

    run_cli(run_shuffle)
elif __name__ == "spark_jobs.shuffle":  # imported, it is the transform of that name
    from spark_jobs.transforms import shuffle

    sys.modules[__name__] = shuffle  # pyrefly: ignore[unsupported-operation] imports take what they find here
