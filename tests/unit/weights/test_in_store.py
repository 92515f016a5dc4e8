"""Safetensors of a store are those of a disk: whatever part is asked for, and byte for byte when they are written."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fft.data import views
from fft.data.storage import Storage
from fft.data.views import StoredFile, noted, view
from fft.errors import UserError
from fft.weights import in_store
from fft.weights.files import load_tensors, opened
from fft.weights.in_store import StoredTensors, write_tensors_to

TENSORS = {
    "scalar": torch.tensor(3.5),
    "vector": torch.arange(11, dtype=torch.int64),
    "matrix": torch.randn(37, 5).to(torch.bfloat16),
    "experts": torch.randn(4, 6, 10),
    "codes": torch.randn(8, 8).to(torch.float8_e4m3fn),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def small_requests(monkeypatch):
    """So that the smallest of tensors take several."""
    monkeypatch.setattr(views, "_CHUNK", 16)
    monkeypatch.setattr(in_store, "_BLOCK", 100)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_all_tensors(folder):
    note = view(f"file://{folder}") / "model.safetensors"
    assert noted(note).size == (folder / "model.safetensors").stat().st_size
    with opened(note) as tensors:
        assert isinstance(tensors, StoredTensors)
        assert tensors.metadata() == {"format": "pt"}
    found = load_tensors(note)
    assert found.keys() == TENSORS.keys()
    assert all(equal(found[name].reshape(-1), TENSORS[name].reshape(-1)) for name in TENSORS)
    assert [t.shape for _, t in sorted(found.items())] == [t.shape for _, t in sorted(TENSORS.items())]


cuts = st.tuples(st.none() | st.integers(-3, 12), st.none() | st.integers(-3, 12)).map(lambda ends: slice(*ends))


@settings(deadline=None)
@given(st.sampled_from(["vector", "matrix", "experts", "none"]), st.lists(cuts, min_size=1, max_size=3))
def test_any_part(folder, name, index):
    """As safetensors slices; it refuses ends that lie outside or cross, which here are as Python's."""
    wanted = TENSORS[name][tuple(index[: TENSORS[name].ndim])]
    with opened(view(f"file://{folder}") / "model.safetensors") as tensors:
        found = tensors.get_slice(name)[tuple(index[: TENSORS[name].ndim])]
    assert (found.dtype, found.shape, found.tolist()) == (wanted.dtype, wanted.shape, wanted.tolist())


def test_bytes_are_those_of_save_file(folder, tmp_path):
    storage = Storage.at(f"file://{tmp_path}")
    digest = write_tensors_to(storage, "written.safetensors", TENSORS, {"format": "pt"})
    written = (tmp_path / "written.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()
    with safe_open(tmp_path / "written.safetensors", framework="pt") as tensors:
        assert tensors.keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no readable safetensors file"),
        (b"\xff" * 100, "is no readable safetensors file"),
        ((20).to_bytes(8, "little") + b"not JSON" + bytes(20), "is no readable safetensors file"),
        (None, "lies outside of it"),
    ],
)
def test_what_is_no_such_file_is_named(content, said, tmp_path):
    if content is None:
        header = json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(30)
    (tmp_path / "cut.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"file://{tmp_path}/cut.safetensors .*{said}|{said}"):
        StoredTensors(StoredFile(f"file://{tmp_path}/cut.safetensors", len(content)))


def test_a_file_that_became_shorter_is_named(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    file = StoredFile(f"file://{tmp_path}/model.safetensors", (tmp_path / "model.safetensors").stat().st_size)
    tensors = StoredTensors(file)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"is shorter than the .* bytes that it had"):
        [tensors.get_tensor(name) for name in TENSORS]
