"""Cut a token table into equal partitions of packed rows: ``spark-submit spark_jobs/repartition.py --help``."""

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
from spark_jobs.cli import run_repartition as main

if __name__ == "__main__":
    run_cli(main)
