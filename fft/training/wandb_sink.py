"""Weights & Biases as a run's sink. A process of its own speaks with the server, or, offline, writes files alone."""

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from fft.errors import one_line
from fft.files import own_folder
from fft.training.mlflow_sink import PATIENCE, RunFacts

#: What says that it is wanted, and how; see its documentation.
_ASKS = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_MODE")
#: Seconds that the end of a run waits for what is still to be sent.
_LEFT = 60.0


class WeightsAndBiases:
    """A run there: a new one, the one that ``WANDB_RUN_ID`` names, or that of the run gone on with.

    Numbers are shown over ``step``; steps that are taken again are there twice. Files of an offline run, and notes of
    any, are in ``folder``.
    """

    def __init__(self, facts: RunFacts, folder: Path | None, log: Callable[[str], None]) -> None:
        import wandb

        self._log = log
        known = os.environ.get("WANDB_RUN_ID") or facts.wandb
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        if folder is not None:
            own_folder(folder / "wandb")  # where its files go, and no link of another's is to lead them
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = PATIENCE
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flash-fine-tuning"),
            dir=None if folder is None else str(folder),
            config=dict(facts.parameters),
            id=known,
            resume="allow" if known else None,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        #: The run's id.
        self.run: str = self._run.id
        log(f"Weights & Biases run {self.run} at {self._run.dir if self._run.offline else self._run.url}")

    @staticmethod
    def wanted() -> bool:
        """Whether it is installed and asked for, by one of its variables."""
        asked = any(name in os.environ for name in _ASKS) and os.environ.get("WANDB_MODE") != "disabled"
        return asked and importlib.util.find_spec("wandb") is not None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand them over; what has a group in its name stays in it."""
        self._run.log({"step": step, **values})

    def close(self, well: bool) -> None:
        """End the run. What could not be sent in time stays in its files."""
        ending = threading.Thread(target=self._finish, args=(0 if well else 1,), name="wandb", daemon=True)
        ending.start()
        ending.join(_LEFT)
        if ending.is_alive():
            self._log(f"warning: Weights & Biases has not got everything: wandb sync {self._run.dir} sends the rest")

    def _finish(self, code: int) -> None:
        try:
            self._run.finish(exit_code=code)
        except Exception as error:  # whatever its client may raise
            self._log(f"warning: Weights & Biases did not end its run ({one_line(error)})")
