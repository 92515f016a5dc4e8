"""YAML that a stranger may have written."""

from typing import Any

import yaml

#: What a value may hold, references followed: a few lines can name a billion; how deep one may be in another.
_MOST_VALUES, _DEEPEST = 1_000_000, 100
#: What PyYAML raises beside its own errors, for numbers, dates and truths that are none.
_OTHERS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def yaml_value(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, and nothing else, for what is none or cannot be used: also where it
    is nested too deeply, holds itself, or names so many values by references that no memory holds them."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, *_OTHERS) as error:
        raise ValueError(f"it is no YAML: {error or type(error).__name__}") from error
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError("it is nested too deeply, or names too many values by references")
        if isinstance(one, dict):
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, (list, tuple, set)):
            left += [(part, depth + 1) for part in one]
    return value
