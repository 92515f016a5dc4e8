"""Every notebook runs from its first cell to its last, in a fresh kernel, and shows what it says."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

#: What each shows: a pattern, whose two numbers, if it has them, fall by as much.
SHOWN = {
    "pretrain": (r"validation loss (\S+) -> (\S+)", 0.5),
    "chat_lora": (r"^loss (\S+) -> (\S+)", 1.0),
    "image_chats": (r"^loss (\S+) -> (\S+)", 0.5),
    "generate_filter_trace": (r"^prompt-\d+ was seen in steps \[\d+, \d+", 0),
}
#: Those that need no classic Spark run on Sail, which starts in a second.
ON_SPARK = {"pretrain"}
#: Files that they leave.
LEFT = {"pretrain": "model/model.safetensors.index.json", "chat_lora": "adapter/adapter_model.safetensors"}
#: Pages of tables and runs among their outputs.
PAGES = {"pretrain": 2, "chat_lora": 1, "image_chats": 1, "generate_filter_trace": 0}


def test_all_are_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_nothing_that_cells_showed_is_kept(path):
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FFT_NOTEBOOK_DIR", str(tmp_path))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("FFT_ENGINE", "" if name in ON_SPARK else "sail")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pattern, by = SHOWN[name]
    found = re.search(pattern, "".join(output.get("text", "") for output in outputs), re.MULTILINE)
    assert found
    if by:
        first, last = map(float, found.groups())
        assert last < first - by
    assert (tmp_path / LEFT.get(name, ".")).exists()
    pages = [output["data"].get("text/html", "") for output in outputs if "data" in output]
    assert sum("<iframe" in page and ("svg" in page or "data:image" in page) for page in pages) == PAGES[name]
