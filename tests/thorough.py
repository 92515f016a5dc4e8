"""Cases that show in another way what the rest of their file shows: `make test-thorough` runs them, not `make test`."""

import pytest


def thorough(*values: object, id: str | None = None):
    """``pytest.param``, of such a case."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)
