"""Console entry points of the jobs, ``fft-tokenize`` and the like: an installed wheel needs no path into a checkout.

They start Spark as a notebook does, also as a task of Databricks (``python_wheel_task``). On a cluster,
``spark-submit`` starts the scripts of this folder.
"""

from fft.errors import run_cli
from spark_jobs.cli import run_generate, run_repartition, run_shuffle, run_tokenize


def tokenize_command() -> None:
    """``fft-tokenize``."""
    run_cli(run_tokenize)


def shuffle_command() -> None:
    """``fft-shuffle``."""
    run_cli(run_shuffle)


def repartition_command() -> None:
    """``fft-repartition``."""
    run_cli(run_repartition)


def generate_command() -> None:
    """``fft-generate``."""
    run_cli(run_generate)
