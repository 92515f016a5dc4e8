"""A copy of the checkout, for what writes into it."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: For `make`: the environment is this one, whichever file is the newer. Nothing is installed into it.
AS_IT_IS = ("--old-file", ".venv/.installed")
_LEFT_OUT = (".git", ".venv*", "runs", "dist", "build", "mutants", "shared", ".*_cache", "__pycache__")


def copy_checkout(folder: Path) -> Path:
    """The files that somebody has who clones it, and this environment as a link."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy
