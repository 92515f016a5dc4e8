"""Operators that are compiled on first use, in a folder that runs share."""

import sys
from collections.abc import Callable
from pathlib import Path

from torch.utils import cpp_extension

from fft.files import alone, remove_file


def compile_alone(name: str, load: Callable[[], object]) -> None:
    """Have ``load`` compile the operator ``name``, while no other run of ours compiles it in the same folder.

    torch marks a folder in which it compiles by a file, and others wait as long as that is there: for ever, where a
    process left it that was killed. Our lock goes with its process, so a mark that is found under it is such a one.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))

    def wait() -> None:
        print(f"waiting for another process, which compiles {name} in {folder}", file=sys.stderr, flush=True)

    with alone(folder / "fft.lock", wait=wait):
        remove_file(folder / "lock")
        if not (folder / f"{name}.so").exists():
            print(f"compiling {name} in {folder}, once, for some minutes at most", file=sys.stderr, flush=True)
        load()
