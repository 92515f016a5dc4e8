"""One command from conversations to a small chat model that follows them: ``python -m fft.quickstart.chat``."""
