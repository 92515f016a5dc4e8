"""What a device does in a training step, measured part by part: `python -m benchmarks.device`."""
