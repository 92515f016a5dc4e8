"""docs/two-nodes.md: planned for real, launched as two nodes of one rank each, here."""

import json
import os

import pytest
import yaml
from conftest import SMALL
from walk import commands_of, launch_all, walk

pytestmark = pytest.mark.slow
PAGE = "docs/two-nodes.md"


def test_the_page_arrives(ragged_table, tmp_path):
    settings = tmp_path / "14b.yaml"
    plan, dry, parity, *launch = commands_of(PAGE, {"conf/14b-mine.yaml": settings, **shared(tmp_path, ragged_table)})
    *launch, report, convert = launch
    told = walk(plan)
    assert "tokens/s" in told
    written = yaml.safe_load(settings.read_text())
    sizes = [written.get(f"{name}_parallel_size", 1) for name in ("pipe", "sequence", "model")]
    assert 16 % (sizes[0] * sizes[1] * sizes[2]) == 0
    assert "stage" in walk(dry)
    # The same command with the settings of a model that two ranks hold, in as many stages as there are nodes.
    small = {"pipe_parallel_size": 2, "seq_len": 32, "dtype": "fp32", "max_steps": 4, "gradient_accumulation_steps": 2}
    small |= {"init": True, "warmup_steps": 1, "model": str(tmp_path / "config.json")}
    settings.write_text(yaml.safe_dump(small))
    walk(parity)
    told = launch_all(launch)
    assert "step 4/4" in told
    assert (tmp_path / "run" / "latest").is_file()
    walk(report)
    assert os.path.getsize(tmp_path / "run.html") > 1000
    walk(convert)
    assert json.loads((tmp_path / "model-last" / "config.json").read_text())["model_type"] == "llama"


def shared(folder, table) -> dict[str, object]:
    """What stands for the folders that both machines see, and for the eight ranks of each."""
    config = folder / "config.json"
    config.write_text(json.dumps(SMALL | {"model_type": "llama"}))
    return {
        "--nproc_per_node 8": "--nproc_per_node 1",
        "/shared/Qwen2.5-14B": config,
        "/shared/packed/train": table,
        "/shared/packed/validation": table,
        "/shared/": f"{folder}/",
    }
