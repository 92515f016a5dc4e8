"""One command from drawn pictures to a small model that answers questions about them: ``python -m
fft.quickstart.vision``."""
