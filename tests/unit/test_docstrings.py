"""The examples in docstrings run, and every public function of Python's has one."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import fft.plan
import fft.report
import fft.spark
from fft.chart import Picture, bars
from fft.data.manifest import Manifest, Manifests
from fft.spark import Result

ROOT = Path(__file__).parents[2]
MODULES = ("fft.chart", "fft.data.manifest", "fft.plan", "fft.plan.found", "fft.report", "fft.report.shown")
MODULES += ("fft.spark", "fft.spark.cluster")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed


@pytest.mark.parametrize("package", [fft.plan, fft.report, fft.spark])
def test_every_public_name_of_python_s_is_told_by_an_example(package):
    told = package.__doc__ + "".join(getattr(package, name).__doc__ for name in package.__all__)
    functions = [name for name in package.__all__ if not isinstance(getattr(package, name), type)]
    assert functions
    assert all(f"{name}(" in told and ">>>" in told for name in functions)


def test_results_show_themselves_in_a_notebook(tmp_path):
    """As tables and images that change no other cell's styles."""
    counts = {
        "lengths": {"1": 3, "64": 9},
        "datasets": {"web<b>": {"rows": 1, "tokens": 30}, "x": {"rows": 1, "tokens": 10}},
    }
    made = Manifests(train=Manifest((), 12, 40, lineage={"counts": counts}))
    picture = made.plot()
    for words in ("train documents by length", "from 64 tokens", "web&lt;b&gt;", "75.0%"):
        assert words in picture.svg
    assert made["train"].plot().svg == picture.svg.replace("train ", "")
    picture.save(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text() == picture.svg
    records = [
        {"step": 1.0, "loss": 2.5},
        {"step": 2.0, "loss": float("nan")},
        {"step": 3.0, "loss": 2.0, "eval_loss": 2.25},
    ]
    result = Result("runs/<model>", None, records)
    page = result._repr_html_()
    assert ">runs/&lt;model&gt;</td>" in page
    assert ">2.2500</td>" in page
    assert "<style" not in page + picture._repr_html_()
    assert "<polyline" in result.plot().svg
    assert Result(None, None, []).plot()._repr_html_() == "<p>no numbers</p>"
    assert Picture(bars([("empty", [])])).svg.startswith("<svg")
