"""The device under test, and a line a test for the report of run.py. Nothing in this folder needs the other tests."""

import json
import os
from pathlib import Path

import pytest
import torch

DEVICES = ("cuda", "npu", "cpu")


def pytest_addoption(parser):
    parser.addoption("--device", choices=DEVICES, help="what to test (the first that is there)")
    parser.addoption("--results", type=Path, help="append what became of each test to this file, as JSON lines")


def device_type(config) -> str:
    """The type of device that was asked for, or the first that torch sees."""
    if asked := config.getoption("--device", None):
        return asked
    try:
        import torch_npu  # noqa: F401 - registers torch.npu
    except ImportError:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "npu"


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device, and where a kernel is compared, its index."""
    kind = device_type(request.config)
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu":
        import torch_npu  # noqa: F401 - registers torch.npu
    return torch.device(kind, 0)


@pytest.fixture(scope="session")
def small(device) -> bool:
    """Whether this is the rehearsal on a CPU, which takes the smallest size of everything."""
    return device.type == "cpu"


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _tell(report, report.nodeid.rpartition("::")[2], report.duration, dict(report.user_properties))


def pytest_collectreport(report):
    if report.outcome != "passed":
        _tell(report, report.nodeid, 0.0, {})


def pytest_configure(config):
    os.environ["DS_ACCELERATOR"] = device_type(config)  # DeepSpeed looks once, when it is imported
    _results.extend(filter(None, [config.getoption("--results", None)]))


#: Where to: one file a session.
_results: list[Path] = []


def _tell(report, name: str, seconds: float, figures: dict) -> None:
    said = report.longrepr
    reason = said[2] if isinstance(said, tuple) else str(said or "")[-2000:]
    line = {"test": name, "outcome": report.outcome, "seconds": seconds, "reason": reason, "figures": figures}
    for path in _results:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
