"""One command from the standard library's sources to a small trained model: ``python -m fft.quickstart``."""
