"""What flags of the jobs hold that is more than a word or a number."""

import argparse


def column_names(text: str) -> list[str]:
    """``url,license``."""
    return [name for name in (one.strip() for one in text.split(",")) if name]


def fraction(text: str) -> float:
    """A share from 0 to below 1. Raises what argparse takes for an error."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def named_weights(text: str) -> dict[str, float]:
    """``web=0.7,books=2``. Raises what argparse takes for an error."""
    weights = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r} is not NAME=NUMBER, as in web=0.7,books=2") from None
    return weights
