"""JSON that a stranger may have written. Depends on nothing but the standard library."""

import json
from typing import Any


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, and nothing else, for what is none or cannot be read: also where it
    is nested too deeply, has a number of more digits than Python takes, or is no Unicode."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
