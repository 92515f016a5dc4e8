"""Every notebook runs from its first cell to its last, in a fresh kernel."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FFT_NOTEBOOK_DIR", str(tmp_path))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    first, last = map(float, re.search(r"validation loss (\S+) -> (\S+)", shown).groups())
    assert last < first - 0.5
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
