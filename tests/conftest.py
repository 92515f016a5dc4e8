"""Fixtures shared by all tests: small models and tables made from nothing but a seed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device.token_tables import write_table
from spark_classes import environment

from fft.models import small

pytest_plugins = ["object_store"]

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VOCAB, SMALL = small.VOCABULARY, small.SIZES
#: The files that take longest.
MINUTES = ("test_bundle.py", "test_flags_fuzz.py", "test_parity.py", "test_crashes.py", "test_vision_parity.py")

# Models are tiny here and cores few: threads that share out a product of 32 columns only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Another ninja than this environment's would build DeepSpeed's extension again, and then this one again, and so on.
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
# Most of what a small job costs is Java's start.
for _name, _options in environment().items():
    os.environ.setdefault(_name, _options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file of minutes that comes last leaves a core idle, where two files run side by side."""
    items.sort(key=lambda item: item.path.name not in MINUTES)


@pytest.fixture(scope="session")
def launch():
    """Run a command of this environment from the repository's root and return the finished process."""

    def run(*command: object, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        variables = {**os.environ, **(env or {})}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"):
            variables.pop(name, None)
        arguments = [str(part) for part in command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(arguments, cwd=ROOT, env=variables, start_new_session=True, **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:  # a launcher's ranks would outlive it and hold the cores
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def ragged_table(tmp_path_factory) -> Path:
    """Documents of 1 to 90 tokens, as any ``df.write.parquet`` of a list column would leave them."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, rng.integers(1, 90)).astype(np.int32) for _ in range(150)]
    return write_table(tmp_path_factory.mktemp("ragged") / "table", rows)
