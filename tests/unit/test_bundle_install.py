"""install.sh on machines of many kinds, with a bundle of empty wheels."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pip
import pytest
from conftest import ROOT
from test_bundle_contents import build

pytestmark = pytest.mark.slow
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OURS = [
    "transformers>=5,<6",
    "tokenizers>=0.22",
    "torch>=2.11; extra == 'train'",
    "deepspeed; extra == 'train'",
    "flash-fine-tuning[train]; extra == 'more'",
]
CARRIED = {
    "flash_fine_tuning-0.2.0": [*OURS, "Provides-Extra: train", "Provides-Extra: more"],
    "deepspeed-0.19.8": ["torch", "hjson"],
    "hjson-3.1.0": [],
    "tokenizers-0.23.3": ["huggingface-hub"],
    "transformers-5.23.0": ["tokenizers>=0.23.1"],
    "huggingface_hub-2.4.0": [],
}


def metadata_of(package: str, needs: list[str]) -> str:
    name, version = package.split("-")
    lines = [need if need.startswith("Provides") else f"Requires-Dist: {need}" for need in needs]
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])


def add_wheel(folder: Path, package: str, needs: list[str]) -> None:
    name, info = package.split("-")[0], f"{package}.dist-info"
    files = {f"{name}.py": "where = 'the bundle'\n", f"{info}/METADATA": metadata_of(package, needs)}
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with ZipFile(folder / f"{package}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("carried") / "a bundle"
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    for package, needs in CARRIED.items():
        add_wheel(wheels, package, needs)
    with ZipFile(wheels / f"pip-{pip.__version__}-py3-none-any.whl", "w") as archive:
        source = Path(pip.__file__).parent
        for file in (file for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"):
            archive.write(file, Path("pip") / file.relative_to(source))
    platform = f"linux_{os.uname().machine}"
    (folder / "target").write_text(f"python={PYTHON}\nplatform={platform}\nextras=more\n")
    for name in ("install.sh", "resolve.py"):
        shutil.copy(ROOT / "bundle" / name, folder)
    (folder / "SHA256SUMS").write_text(build.sums(folder))
    return folder


@pytest.fixture
def bundle(carried, tmp_path) -> Path:
    """One that a test may change."""
    return shutil.copytree(carried, tmp_path / "carried")


@pytest.fixture
def machine(tmp_path):
    """Make a Python that has some packages; its path."""

    def make(*packages: str, **needs: list[str]) -> Path:
        venv.EnvBuilder(symlinks=True).create(tmp_path / "machine")
        folder = next((tmp_path / "machine").glob("lib/python*/site-packages"))
        for package in packages:
            name = package.split("-")[0]
            info = folder / f"{package}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(metadata_of(package, needs.get(name, [])))
            (folder / f"{name}.py").write_text("where = 'the machine'\nclass version: cuda = '13.0'\n")
        return tmp_path / "machine" / "bin" / "python"

    return make


@pytest.fixture
def install(tmp_path):
    work = tmp_path / "work"
    work.mkdir()

    def run(bundle: Path, *flags: object) -> subprocess.CompletedProcess:
        hostile = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_TARGET": "/nowhere", "PYTHONPATH": str(ROOT)}
        command = [str(bundle / "install.sh"), *map(str, flags)]
        return subprocess.run(command, cwd=work, env=os.environ | hostile, capture_output=True, text=True)

    return run


def origins(python: Path, *names: str, **variables: str) -> dict[str, str]:
    """Where each module that Python imports comes from."""
    code = (
        f"import {', '.join(names)}\nfor module in ({', '.join(names)},): print(module.__name__, module.where, sep='|')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([python, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return dict(line.split("|") for line in done.stdout.splitlines())


def test_a_machine_with_torch_alone_gets_the_rest_from_the_bundle(carried, machine, install, tmp_path):
    done = install(carried, "--python", machine("torch-2.11.0+cu130", torch=["nvidia-cublas"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    told = [line.split() for line in done.stderr.splitlines()]
    assert ["torch", "2.11.0+cu130", "yes", "(>=2.11)", "the", "system"] in told
    assert ["cuda", "13.0", "as", "torch", "has", "it", "the", "system"] in told
    assert ["transformers", "none", "no", "(<6,>=5)", "the", "bundle"] in told
    found = origins(tmp_path / "work" / "fft-venv" / "bin" / "python", "torch", "transformers", "tokenizers", "hjson")
    assert found.pop("torch") == "the machine"
    assert set(found.values()) == {"the bundle"}


def test_transformers_in_range_keeps_the_tokenizers_that_it_wants(carried, machine, install, tmp_path):
    system = ("torch-2.11.0", "transformers-5.17.0", "tokenizers-0.22.1", "huggingface_hub-1.33.0")
    python = machine(*system, transformers=["tokenizers<0.23", "huggingface_hub<2"])
    done = install(carried, "--python", python)
    assert done.returncode == 0, done.stderr
    names = ("transformers", "tokenizers", "huggingface_hub", "deepspeed", "flash_fine_tuning")
    found = origins(tmp_path / "work" / "fft-venv" / "bin" / "python", *names)
    assert found == dict.fromkeys(names[:3], "the machine") | dict.fromkeys(names[3:], "the bundle")


def test_transformers_out_of_range_is_covered_by_the_bundles(carried, machine, install, tmp_path):
    system = ("torch-2.11.0", "transformers-4.57.0", "tokenizers-0.22.1")
    done = install(carried, "--python", machine(*system))
    assert done.returncode == 0, done.stderr
    assert ["transformers", "4.57.0", "no", "(<6,>=5)", "the", "bundle"] in map(str.split, done.stderr.splitlines())
    found = origins(tmp_path / "work" / "fft-venv" / "bin" / "python", "transformers", "tokenizers")
    assert set(found.values()) == {"the bundle"}  # 5.23 wants newer tokenizers


def test_a_folder_for_pythonpath(carried, machine, install, tmp_path):
    python = machine("torch-2.11.0", "hjson-3.0.0")
    done = install(carried, "--python", python, "--target", "some where")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "work" / "some where"
    assert f"PYTHONPATH='{folder}'" in done.stderr
    found = origins(python, "torch", "hjson", "transformers", PYTHONPATH=str(folder))
    assert found == {"torch": "the machine", "hjson": "the machine", "transformers": "the bundle"}


def refused(done: subprocess.CompletedProcess, folder: Path) -> str:
    """The one sentence of a refusal that has changed nothing."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert not list(folder.iterdir())
    return done.stderr.splitlines()[-1]


def test_a_machine_without_torch_or_with_an_old_one_is_refused(carried, machine, install, tmp_path):
    said = refused(install(carried, "--python", machine()), tmp_path / "work")
    assert "has no torch, torch>=2.11 is needed and not in the bundle: install it there, or name another Python" in said
    shutil.rmtree(tmp_path / "machine")
    said = refused(install(carried, "--python", machine("torch-2.10.0")), tmp_path / "work")
    assert "torch 2.10.0 is out of range, torch>=2.11 is needed" in said


def test_a_torch_that_does_not_load_is_refused(carried, machine, install, tmp_path):
    python = machine("torch-2.11.0")
    next((tmp_path / "machine").rglob("torch.py")).write_text("raise OSError('libcudart.so.13: cannot open')")
    assert "does not load (OSError: libcudart.so.13" in refused(install(carried, "--python", python), tmp_path / "work")


def test_another_python_or_platform_is_refused(bundle, machine, install, tmp_path):
    python = machine("torch-2.11.0")
    for old, new, said in (
        (PYTHON, "3.99", f"is Python {PYTHON}, the bundle is for 3.99: name another"),
        ("linux_", "win_", "make one for this machine with PLATFORM=manylinux_2_"),
    ):
        target = (bundle / "target").read_text()
        (bundle / "target").write_text(target.replace(old, new))
        (bundle / "SHA256SUMS").unlink()
        (bundle / "SHA256SUMS").write_text(build.sums(bundle))
        assert said in refused(install(bundle, "--python", python), tmp_path / "work")
        (bundle / "target").write_text(target)


def test_what_neither_has_is_refused_by_name(bundle, machine, install, tmp_path):
    next(bundle.glob("wheels/transformers-*")).unlink()
    next(bundle.glob("wheels/hjson-*")).unlink()
    (bundle / "SHA256SUMS").unlink()
    (bundle / "SHA256SUMS").write_text(build.sums(bundle))
    said = refused(install(bundle, "--python", machine("torch-2.11.0")), tmp_path / "work")
    assert "has no transformers, transformers<6,>=5 is needed" in said
    shutil.rmtree(tmp_path / "machine")
    python = machine("torch-2.11.0", "transformers-5.17.0")
    assert "hjson" in refused(install(bundle, "--python", python), tmp_path / "work")  # what deepspeed needs


def test_a_damaged_bundle_is_refused(bundle, machine, install, tmp_path):
    with open(next(bundle.glob("wheels/hjson-*")), "ab") as wheel:
        wheel.write(b" ")
    assert "damaged or missing" in refused(install(bundle, "--python", machine("torch-2.11.0")), tmp_path / "work")


def test_only_what_it_made_is_replaced_and_only_when_told(carried, machine, install, tmp_path):
    python, mine = machine("torch-2.11.0"), tmp_path / "work" / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    for flags, said in (((), "exists: add --overwrite"), (("--overwrite",), "was not made by install.sh")):
        done = install(carried, "--python", python, "--target", "mine", *flags)
        assert done.returncode == 2
        assert said in done.stderr
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    environment = tmp_path / "work" / "fft-venv"
    environment.mkdir()
    (environment / ".made-by-fft-bundle").touch()
    (environment / "old").touch()
    assert install(carried, "--python", python).returncode == 2
    assert (environment / "old").exists()
    assert install(carried, "--python", python, "--overwrite").returncode == 0
    assert not (environment / "old").exists()


def test_flags(carried, install, tmp_path):
    assert "nowhere was not found" in refused(install(carried, "--python", "nowhere"), tmp_path / "work")
    done = install(carried, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: install.sh")
    assert "--venvv is no flag" in refused(install(carried, "--venvv"), tmp_path / "work")
    assert "--target needs a value" in refused(install(carried, "--target"), tmp_path / "work")
