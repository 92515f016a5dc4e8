"""The bundle, built for this Python, installs without an index beside a torch, trains, and rehearses all it has."""

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from checkout import AS_IT_IS, copy_checkout
from conftest import ROOT, SMALL, VOCAB, write_table
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

#: An index that answers nobody, for whoever asks one.
NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
#: That of torch 2.11, the oldest that we take.
TRITON = "triton==3.6.0"
#: The last, as what is installed is compiled when it is imported first, and that is to be kept.
STRIPPED = (
    *("PYTHONPATH", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "RANK", "LOCAL_RANK", "WORLD_SIZE", "VIRTUAL_ENV"),
    "PYTHONDONTWRITEBYTECODE",
)


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in STRIPPED}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env={**kept, **NO_NETWORK, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """All that the tests below take from the network."""
    folder = tmp_path_factory.mktemp("bundle") / "with a space"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = ("--python_version", python, "--platform", f"manylinux_2_28_{platform.machine()}")
    extras = ("--extras", "train", "device", "liger")
    subprocess.run([sys.executable, ROOT / "bundle" / "build.py", "--output", folder, *target, *extras], check=True)
    return folder


@pytest.fixture(scope="session")
def system(tmp_path_factory) -> Path:
    """The Python of a machine that has torch and what torch needs, and nothing else: links to this environment's.

    A torch for GPUs has Triton with it, this one has not.
    """
    folder = tmp_path_factory.mktemp("system")
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = site_packages(folder)
    for name in needs_of("torch"):
        for path in {Path(file.parts[0]) for file in metadata.distribution(name).files or ()} - {Path("..")}:
            source = Path(metadata.distribution(name).locate_file(path))
            if source.exists() and not (packages / path).exists():
                (packages / path).symlink_to(source)
    install = ("-m", "pip", "--quiet", "install", "--no-deps", "--target", packages, TRITON)
    subprocess.run([sys.executable, *install], check=True)
    return folder / "bin" / "python"


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def needs_of(name: str) -> set[str]:
    requirements = map(Requirement, metadata.requires(name) or ())
    direct = {each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})}
    return {name}.union(*map(needs_of, direct))


@pytest.fixture(scope="session")
def carried(bundle, system, tmp_path_factory) -> Path:
    """The bundle once more, without its wheels, and what it has installed there."""
    place = tmp_path_factory.mktemp("carried") / "bundle"
    shutil.copytree(bundle, place, ignore=shutil.ignore_patterns("wheels"))
    done = run(bundle / "install.sh", "--python", system, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "torch" in done.stderr
    assert f"{metadata.version('torch')}" in done.stderr
    return place


@pytest.fixture(scope="session")
def extensions(tmp_path_factory) -> Path:
    """What DeepSpeed compiles there, once: with another environment's, each would compile all again."""
    return tmp_path_factory.mktemp("extensions")


def test_sha256sum_finds_the_bundle_whole(bundle):
    done = run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=bundle)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}


def test_what_is_installed_trains(carried, extensions, tmp_path):
    """Two steps, far from the repository, in an environment whose torch is the system's."""
    python = carried / "fft-venv" / "bin" / "python"
    names = ("fft", "deepspeed", "torch")
    where = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}), sep='|')"
    fft, deepspeed, torch = run(python, "-c", where, cwd=tmp_path).stdout.strip().split("|")
    assert fft.startswith(str(carried))
    assert deepspeed.startswith(str(carried))
    assert not torch.startswith(str(carried))

    model = tmp_path / "config.json"
    model.write_text(json.dumps(SMALL | {"model_type": "llama"}))
    rows = [np.random.default_rng(n).integers(0, VOCAB, 64).astype(np.int32) for n in range(8)]
    table = write_table(tmp_path / "table", rows)
    variables = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # its own ninja
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }

    def train(*flags: object) -> None:
        inputs = ("--model", model, "--train_data", table, "--output_dir", tmp_path / "out")
        command = (python, "-m", "fft.train", *inputs, "--seq_len", 64, "--max_steps", 2, *flags)
        done = run(*command, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr

    train("--dry_run")
    entered = run("bash", "-c", ". fft-venv/bin/activate && python -m fft.train --help", cwd=carried)
    assert entered.returncode == 0, entered.stderr
    assert "--train_data" in entered.stdout
    train("--init", "--checkpoint", tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "loss" in each] == [1, 2]
    assert (tmp_path / "out" / "model.safetensors").exists()


def rehearse(carried, extensions, *words: str) -> tuple[dict, dict]:
    """Where the bundle lies, from the bundle alone: its tests and benchmarks, with the environment that it made.

    Returns groups and parts by name.
    """
    variables = {"TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"}
    done = run("make", "rehearse", *words, cwd=carried, **variables)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads((carried / "rehearsal-report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert {group["end"] for group in groups.values()} == {"passed"}
    parts = json.loads((carried / "rehearsal-bench.json").read_text())["parts"]
    assert all("rows" in case for cases in parts.values() for case in cases.values()), parts
    assert all(parts.values())
    return groups, parts


def test_a_group_and_a_part_are_rehearsed(carried, extensions):
    groups, parts = rehearse(carried, extensions, "GROUP=loss", "PART=loss")
    assert groups.keys() == parts.keys() == {"loss"}


@pytest.mark.thorough
def test_all_that_a_device_must_prove_is_rehearsed(carried, extensions):
    groups, _ = rehearse(carried, extensions)
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "device").glob("test_*.py")} == groups.keys()
    assert {test["outcome"] for test in groups["triton"]["tests"]} == {"passed"}  # there is a Triton: none is left out


def test_what_the_machine_has_is_not_carried(tmp_path):
    """As if this machine were the one that the bundle is for."""
    copy = copy_checkout(tmp_path)
    listing = "python3 -m pip list --format=freeze | cut -d= -f1 >names.txt"
    making = f"make {' '.join(AS_IT_IS)} bundle SYSTEM=\"$(tr '\\n' ' ' <names.txt)\""
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", f"{listing}\n{making}"], cwd=copy, env=variables, check=True)
    wheels = {path.name.partition("-")[0] for path in (copy / "dist" / "bundle" / "wheels").glob("*.whl")}
    assert wheels == {"flash_fine_tuning", "pip"}  # which is left out of such a list
