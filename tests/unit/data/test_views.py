"""A directory of a store as a local folder: small files as copies, weights as notes, brought up to date when asked."""

import os
from types import SimpleNamespace

import pytest

from fft.data import views
from fft.data.views import naming_places, noted, origin, view, write_bounded
from fft.errors import UserError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "lake" / "model"
    for name in ("config.json", "model.safetensors", "training/state.json", "original/consolidated.00.pth", "x.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_small_files_are_copied_and_weights_are_noted(model):
    seen = view(f"file://{model}/")
    assert files(seen) - {".origin"} == {"config.json", "model.safetensors", "training/state.json", "x.gguf"}
    assert (seen.name, (seen / "config.json").read_text()) == ("model", "config.json")
    assert noted(seen / "config.json") is None
    assert noted(seen / "none") is None
    assert bytes(noted(seen / "model.safetensors").read(0, 5)) == b"model"
    assert b"".join(noted(seen / "model.safetensors").chunks()) == b"model.safetensors"
    assert origin(seen / "training" / "state.json") == f"file://{model}/training/state.json"
    assert origin(model) == str(model)
    assert view(model) == model


def test_it_follows_what_changes(model):
    url = f"file://{model}"
    seen = view(url)
    (model / "config.json").write_text("other")
    os.utime(model / "config.json", (1, 1))
    (model / "x.gguf").unlink()
    (model / "model.safetensors").write_text("new")
    copied = (seen / "training" / "state.json").stat().st_mtime_ns
    assert view(url) == seen
    assert (seen / "config.json").read_text() == "other"
    assert not (seen / "x.gguf").exists()
    assert noted(seen / "model.safetensors").size == 3
    assert (seen / "training" / "state.json").stat().st_mtime_ns == copied


def test_a_file_by_its_url(model):
    seen = view(f"file://{model}/config.json")
    assert seen.read_text() == "config.json"
    assert files(seen.parent) == {".origin", "config.json"}


def test_errors_name_the_place(model):
    with pytest.raises(UserError, match=f"^file://{model}/none does not exist: "):
        view(f"file://{model}/none")
    with pytest.raises(UserError, match=f"^file://{model}/config.json is odd"), naming_places():
        raise UserError(f"{view(f'file://{model}') / 'config.json'} is odd")


@pytest.mark.parametrize("pieces", [[30] * 20, [1000], [99, 1, 250, 7]])
def test_what_is_on_its_way_is_bounded(pieces, monkeypatch):
    """Clients keep what they send behind a caller's back until the store has it."""
    monkeypatch.setattr(views, "_SENT", 100)
    written, waiting = bytearray(), [0, 0]

    def write(part):
        written.extend(part)
        waiting[:] = waiting[0] + len(part), max(waiting[1], waiting[0] + len(part))

    def flush():
        waiting[0] = 0

    target = SimpleNamespace(stream=SimpleNamespace(write=write, flush=flush, tell=lambda: len(written)))
    for number, size in enumerate(pieces):
        write_bounded(target, bytes([number]) * size)
    assert bytes(written) == b"".join(bytes([number]) * size for number, size in enumerate(pieces))
    assert waiting[1] < 200
