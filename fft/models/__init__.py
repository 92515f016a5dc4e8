"""Hugging Face architectures as pipeline layers."""
