"""Flash Fine Tuning: train large language models straight from the token tables that Spark wrote.

Importing this package is light: no torch, no pyspark.
"""

__version__ = "0.2.0"
