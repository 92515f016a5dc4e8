"""A run: DeepSpeed's engine, the loop around it, what it shows and what it keeps."""
