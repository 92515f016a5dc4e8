"""``databricks.yml``: keys that Databricks knows, commands with flags that the jobs know, a notebook that takes what it
is given.

Fields are those of the data classes of ``databricks-bundles`` 1.22.1, which are made from the published schema: as much
of them as the file uses. The whole file went through these classes, unchanged, when it was written.
"""

import json
import re
import tomllib
from importlib import import_module

import pytest
import yaml
from conftest import ROOT

from spark_jobs import cli

BUNDLE = yaml.safe_load((ROOT / "databricks.yml").read_text())
JOBS = BUNDLE["resources"]["jobs"]
#: Objects of the schema: fields, and of those that are objects, or lists of them, which.
CLUSTER = {"spark_version": {}, "node_type_id": {}, "num_workers": {}, "data_security_mode": {}, "spark_conf": None}
TASK = {
    **{"task_key": {}, "job_cluster_key": {}, "max_retries": {}, "new_cluster": CLUSTER},
    "depends_on": {"task_key": {}, "outcome": {}},
    "libraries": {"whl": {}, "pypi": {"package": {}, "repo": {}}},
    "python_wheel_task": {"package_name": {}, "entry_point": {}, "parameters": {}, "named_parameters": None},
    "notebook_task": {"notebook_path": {}, "base_parameters": None, "source": {}},
}
SCHEMA = {
    "bundle": {"name": {}},
    "artifacts": {"*": {"type": {}, "build": {}, "path": {}}},
    "variables": {"*": {"description": {}, "default": {}}},
    "targets": {"*": {"mode": {}, "default": {}}},
    "resources": {
        "jobs": {
            "*": {
                **{"name": {}, "max_concurrent_runs": {}, "tasks": TASK},
                "job_clusters": {"job_cluster_key": {}, "new_cluster": CLUSTER},
            }
        }
    },
}
TASKS = [task for job in JOBS.values() for task in job["tasks"]]


def check(value: object, schema: dict | None, where: str) -> None:
    """``None``: any keys; ``{}``: no object."""
    if isinstance(value, list):
        for entry in value:
            check(entry, schema, where)
    elif isinstance(value, dict) and schema is not None:
        assert schema, f"{where} is no object"
        for key, entry in value.items():
            assert key in schema or "*" in schema, f"{where}.{key} is unknown"
            check(entry, schema.get(key, schema.get("*")), f"{where}.{key}")


def test_every_key_is_one_of_the_schema():
    check(BUNDLE, SCHEMA, "databricks")
    clusters = {name for job in JOBS.values() for name in [c["job_cluster_key"] for c in job.get("job_clusters", ())]}
    assert {task["job_cluster_key"] for task in TASKS if "job_cluster_key" in task} == clusters


def test_variables_are_declared_and_used():
    used = set(re.findall(r"\$\{var\.(\w+)\}", (ROOT / "databricks.yml").read_text()))
    assert used == set(BUNDLE["variables"])


@pytest.mark.parametrize("task", [task for task in TASKS if "python_wheel_task" in task], ids=lambda t: t["task_key"])
def test_commands_take_their_flags(task):
    told = task["python_wheel_task"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts[told["entry_point"]].split(":")
    assert callable(getattr(import_module(module), name))
    parser = getattr(cli, f"{task['task_key']}_parser")()
    values = {name: spec["default"] for name, spec in BUNDLE["variables"].items()}
    words = [re.sub(r"\$\{var\.(\w+)\}", lambda found: values[found[1]], word) for word in told["parameters"]]
    assert parser.parse_args(words).overwrite


def test_the_notebook_has_a_widget_for_every_parameter():
    (task,) = [task["notebook_task"] for task in TASKS if "notebook_task" in task]
    cells = json.loads((ROOT / task["notebook_path"]).read_text())["cells"]
    source = "".join(line for cell in cells for line in cell["source"])
    assert set(task["base_parameters"]) <= set(re.findall(r'parameter\("(\w+)"', source))
