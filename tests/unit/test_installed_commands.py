"""Console commands of an installed wheel: each is there, and says what it is called."""

import inspect
import re
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import spark_jobs
from fft.data.manifest import FileInfo, Manifest, Manifests
from spark_jobs import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
JOBS = {"tokenize": "tokenize_table", "shuffle": "shuffle_tables", "repartition": "repartition_table"}
JOBS["generate"] = "generate_table"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_says_what_it_is_called(name, monkeypatch, capsys):
    module, _, function = SCRIPTS[name].partition(":")
    monkeypatch.setattr(sys, "argv", [f"/anywhere/bin/{name}", "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        getattr(import_module(module), function)()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize("name", JOBS)
def test_parameters_have_the_names_of_flags(name):
    parser = getattr(cli, f"{name}_parser")()
    flags = {
        action.dest: [option for option in action.option_strings if option.startswith("--")]
        for action in parser._actions
        if action.dest != "help"
    }
    assert {dest for dest, options in flags.items() if f"--{dest}" not in options} <= {"inputs"}
    given = inspect.signature(getattr(spark_jobs, JOBS[name])).parameters.values()
    names = {parameter.name for parameter in given if parameter.kind is not parameter.VAR_KEYWORD}
    assert names - {"spark"} <= set(flags)
    if name != "generate":  # whose settings of sampling and engine are those of its dataclasses
        assert names - {"spark"} == set(flags)


def test_a_notebook_shows_manifests_as_tables():
    counts = {"datasets": {"a<b>": {"rows": 2, "tokens": 1234}}}
    made = Manifest((FileInfo("p", 2, 1234, 9),), 2, 1234, lineage={"job": "shuffle", "counts": counts})
    page = cells(Manifests(train=made))
    assert "<td>train<td>shuffle<td>1<td>2<td>1,234<td>9<td>" in page
    assert "<td>from a&lt;b&gt;<td>" in page
    assert "<td>9<td>unknown</tr>" in page  # an older release has not counted what is trained
    assert cells(made) == page.replace("<td>train<td>", "<td><td>")
    trained = replace(made, lineage={"job": "shuffle", "counts": counts | {"trained_tokens": 0}})
    assert "<td>9<td>0</tr>" in cells(trained)


def cells(shown):
    """What a notebook is given, without styles."""
    return re.sub(r' style="[^"]*"|</td>', "", shown._repr_html_())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_fits_a_screen_and_names_every_flag(name, monkeypatch, capsys):
    """At 80 columns; what is left out of the explanations is named, and explained by ``--help_all``."""
    module, _, function = SCRIPTS[name].partition(":")
    monkeypatch.setenv("COLUMNS", "80")
    pages = []
    for flag in ("--help", "--help_all"):
        monkeypatch.setattr(sys, "argv", [f"/anywhere/bin/{name}", flag])
        with pytest.raises(SystemExit) as ended:
            getattr(import_module(module), function)()
        pages.append(capsys.readouterr().out if ended.value.code == 0 else "")
    brief, full = pages
    assert len(brief.splitlines()) < 60
    assert set(re.findall(r"^  (?=-)[^\n]*?(--\w+)", full, re.MULTILINE)) <= set(re.findall(r"--\w+", brief))
