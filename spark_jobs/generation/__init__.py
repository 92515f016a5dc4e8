"""Generation inside Spark: prompts of files and DataFrames, one engine a worker, answers as rows."""
