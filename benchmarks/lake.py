"""Folders of a benchmark in a store."""

from pathlib import Path

from fft.console import say
from fft.data.manifest import MANIFEST_NAME
from fft.data.storage import Storage
from fft.data.views import files_below, send


def copied(folder: Path, lake: str) -> str:
    """The URL of a local folder's copy in a lake, which is made where it is not there; a manifest comes last."""
    place = Storage.at(f"{lake.rstrip('/')}/{folder.name}")
    sizes = {name: found.size for name, found in files_below(place).items()}
    missing = [f for f in folder.iterdir() if f.is_file() and sizes.get(f.name) != f.stat().st_size]
    if missing:
        say(f"copying {folder} to {place.name}")
    for file in sorted(missing, key=lambda f: (f.name == MANIFEST_NAME, f.name)):
        send(file, place, file.name)
    return place.name
