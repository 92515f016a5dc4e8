"""Text and conversations to ids and labels, for jobs, trainer and serving; imports neither torch nor pyspark."""
