"""When a run has nothing more to gain."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStop:
    """Watches validation losses: over after ``patience`` evaluations in a row without a new lowest (0: never).

    ``best`` and ``stalled`` are its state, which checkpoints keep.
    """

    patience: int
    best: float = math.inf
    stalled: int = 0

    def see(self, loss: float) -> bool:
        """Take the loss of an evaluation; returns whether it is the lowest so far."""
        improved = loss < self.best
        self.best, self.stalled = (loss, 0) if improved else (self.best, self.stalled + 1)
        return improved

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return 0 < self.patience <= self.stalled

    def state(self) -> dict:
        """What :class:`EarlyStop` takes besides the patience to go on; null for what JSON has no number for."""
        return {"best": self.best if math.isfinite(self.best) else None, "stalled": self.stalled}

    @classmethod
    def from_state(cls, patience: int, state: dict | None) -> "EarlyStop":
        """Where :meth:`state` stood; at the beginning without one."""
        if state is None or state["best"] is None:
            return cls(patience, stalled=state["stalled"] if state else 0)
        return cls(patience, **state)
