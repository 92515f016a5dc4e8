"""A run's checkpoints: a model in Hugging Face's format and the training state beside it."""
