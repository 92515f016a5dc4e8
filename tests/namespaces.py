"""Mounts that a test makes for itself, whoever runs it."""

import os
import shutil
import subprocess
from functools import cache

import pytest


@cache
def _unshare() -> tuple[str, ...] | None:
    ways = [("unshare", "-m")] * (os.geteuid() == 0) + [("unshare", "-rm")]
    mount = ("bash", "-c", "mount -t tmpfs none /mnt")
    if shutil.which("unshare") is None:
        return None
    return next((way for way in ways if not subprocess.run([*way, *mount], capture_output=True).returncode), None)


def own_mounts() -> tuple[str, ...]:
    """What a command begins with that may mount, and alone sees it: as root or, where the system lets others have such
    a namespace, as root of that one. Skips the test where it does neither."""
    way = _unshare()
    if way is None:
        pytest.skip("this system lets this user mount nothing, not even for himself")
    return way
