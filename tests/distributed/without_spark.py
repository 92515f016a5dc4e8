"""The trainer on a machine that has no Spark: what imports it, or the jobs, fails."""

import sys

for name in ("pyspark", "pysail", "spark_jobs"):
    sys.modules[name] = None

from fft.train import cli  # noqa: E402 - what comes before is the point

if __name__ == "__main__":
    cli()
