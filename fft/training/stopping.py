"""Who asks a run to end before its last step: a signal, or a launcher that is gone.

A launcher that is killed leaves its ranks behind, which would train on and keep the run's folder locked. Of a rank's
ancestors those up to the outermost launcher are watched: a shell above that may end, as ``nohup`` means it to.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import PurePath

import psutil

#: Scripts and modules that start ranks.
_LAUNCHERS = {"deepspeed", "torchrun", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}
_LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "fft.spark.keeper"}


class StopRequest:
    """What has asked this process to end, from now on; with ``signals``, SIGTERM and its like do not end it at once.

    ``above`` are the processes that have to live, see :func:`launchers`.
    """

    def __init__(self, signals: bool, above: Sequence[psutil.Process]) -> None:
        self._received: list[int] = []
        self._above = above
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signals else ():
            # Who starts a run with nohup has it ignore the terminal's end.
            if number != signal.SIGHUP or signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda caught, _: self._received.append(caught))

    @property
    def reason(self) -> str | None:
        """How a sentence that begins with "stopped" goes on; None while nobody has asked."""
        if self._received:
            return f"by the signal {signal.Signals(self._received[0]).name}"
        return None if all(map(_lives, self._above)) else "because the launcher is gone"


def launchers() -> list[psutil.Process]:
    """The processes above this one, up to the outermost launcher; none where nothing launched it.

    To be asked for early: one that is gone by then is not known.
    """
    above = psutil.Process().parents() if "RANK" in os.environ else []
    found = [index for index, process in enumerate(above) if _launches(process)]
    return above[: found[-1] + 1] if found else []


def _launches(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # gone, or another user's
        return False
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    return bool(words) and "python" in PurePath(words[0]).name and PurePath(script).name in _LAUNCHERS


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
