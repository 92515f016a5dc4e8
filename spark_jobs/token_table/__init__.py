"""Token tables as inputs and outputs of the jobs."""
