"""Weights as Hugging Face stores them, in and out."""
