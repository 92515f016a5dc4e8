"""Spark and its workers."""
