"""The trainer on machines that share no disk: every rank works in a folder of its own, below the one named first."""

import os
import sys
from pathlib import Path

from fft.train import cli

if __name__ == "__main__":
    os.chdir(Path(sys.argv.pop(1), os.environ["RANK"]))
    cli()
