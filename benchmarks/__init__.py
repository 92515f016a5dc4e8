"""Measurements, a script a claim, each beside what it is compared with. Run from the repository's root."""
