"""A folder with a stranger's modules, in which a command happens to be run: none of them is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Of the standard library, of what commands need, and of what they look for.
PLANTED = ("json", "argparse", "yaml", "pyarrow", "torch", "transformers", "vllm", "pyspark", "mlflow", "fastokens")


@pytest.fixture
def folder(tmp_path):
    """Where modules lie that leave a mark."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + ' ')")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "fft.train --dry_run --train_data none --model none",
        "fft.serve.batch_infer --model . --prompt_file none --output_file out",
        "spark_jobs.tokenize -i none -o out --tokenizer none",
    ],
)
def test_commands_take_no_module_from_there(command, folder):
    environment = {**os.environ, "PYTHONPATH": f":{ROOT}"}  # an empty name, as of a variable that was not set
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not (folder / "mark").exists(), (folder / "mark").read_text()
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")


def test_what_commands_start_takes_none_either(folder):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import vllm'], stderr=subprocess.DEVNULL)"
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = '-m'; import fft; {code}"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert not (folder / "mark").exists()


def test_a_checkout_stays_where_it_is_run():
    done = subprocess.run(
        [sys.executable, "-m", "fft.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_changes_no_path():
    code = "import sys; before = list(sys.path); import fft; assert sys.path == before and 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
