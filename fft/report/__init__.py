"""A page about a run, for whoever wants to look at it: one HTML file that needs nothing else."""
