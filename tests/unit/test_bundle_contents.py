"""What goes into the bundle, and what of it a machine needs."""

import importlib.util
import os
import subprocess
import tomllib
from types import ModuleType
from zipfile import ZipFile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from fft.errors import UserError


def module(name: str) -> ModuleType:
    """A script of bundle/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bundle_{name}", ROOT / "bundle" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


build, resolve = module("build"), module("resolve")

PINS = {
    "numpy": "2.4.6",
    "tokenizers": "0.23.3",
    "huggingface-hub": "2.4.0",
    "hf-xet": "1.8.0",
    "tomli": "2.0",
    "plots": "3",
}
NEEDS = {
    "ours": [
        "numpy>=2,<3",
        "Tokenizers>=0.22",
        'torch>=2.11; extra == "train"',
        'ours[train]; extra == "gpu"',
        'plots; extra == "gpu"',
    ],
    "tokenizers": ["huggingface_hub<3"],
    "huggingface-hub": [
        'hf-xet; platform_machine == "x86_64"',
        'tomli; python_version < "3.12"',
        'colorama; os_name == "nt"',
    ],
}
TARGET = build.target_environment("3.12", "manylinux_2_28_x86_64")


def closure(extras="", environment=TARGET, pins=PINS, needs=NEEDS, system=()):
    return build.closure(Requirement(f"ours[{extras}]"), lambda name: needs.get(name, []), pins, environment, system)


def test_the_bundle_has_what_is_needed_and_nothing_of_the_device():
    assert closure("train") == {name: PINS[name] for name in ("numpy", "tokenizers", "huggingface-hub", "hf-xet")}


def test_extras_of_our_own_extras_count():
    assert closure("gpu") == {**closure("train"), "plots": "3"}


def test_markers_are_those_of_the_target():
    arm = build.target_environment("3.11", "manylinux_2_28_aarch64")
    assert set(closure(environment=arm)) == {"numpy", "tokenizers", "huggingface-hub", "tomli"}


def test_what_only_a_package_of_the_system_needs_is_left_out():
    assert set(closure(system=["Tokenizers"])) == {"numpy"}


@pytest.mark.parametrize("name", ["torch", "triton", "nvidia-cublas-cu13", "cuda-bindings", "torch-npu", "vllm"])
def test_packages_of_the_device_are_the_targets_own(name):
    assert closure(needs={"ours": [name]}) == {}


def test_a_package_without_a_pin_is_named():
    with pytest.raises(UserError, match="liger-kernel is not pinned"):
        closure(needs={"ours": ["liger_kernel"]})


def test_a_pin_out_of_range_is_named():
    with pytest.raises(UserError, match=r"numpy 2\.4\.6, but numpy>=3 is needed"):
        closure(needs={"ours": ["numpy>=3"]})


def test_circles_of_needs_end():
    assert set(closure(needs={"ours": ["numpy"], "numpy": ["plots"], "plots": ["numpy"]})) == {"numpy", "plots"}


def test_wheels_for_an_older_glibc_will_do():
    tags = build.platforms("manylinux_2_28_x86_64")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(tags)
    assert "manylinux2014_x86_64" not in build.platforms("manylinux_2_16_x86_64")
    with pytest.raises(UserError, match="win_amd64 is no platform"):
        build.platforms("win_amd64")


def test_pins_are_read_with_normalized_names(tmp_path):
    (tmp_path / "constraints.txt").write_text("# tested\nJinja2==3.1.6\ntyping_extensions==4.16.0  # why\n\n")
    assert build.pins(tmp_path / "constraints.txt") == {"jinja2": "3.1.6", "typing-extensions": "4.16.0"}


def test_all_that_training_needs_is_pinned():
    pins = build.pins(ROOT / "constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {"ours": project["dependencies"] + project["optional-dependencies"]["train"]}
    installed = build.published(pins)
    found = build.closure(
        Requirement("ours"), lambda name: needs[name] if name == "ours" else installed(name), pins, TARGET, ()
    )
    assert {"deepspeed", "pyarrow", "transformers", "hf-xet"} < set(found)
    assert not {"torch", "matplotlib", "pyspark", "pandas", "tensorboard"} & set(found)


def test_sums_are_what_sha256sum_reads(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a b.whl").write_bytes(b"wheel")
    (tmp_path / "SHA256SUMS").write_text(build.sums(tmp_path))
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).stdout == b"wheels/a b.whl: OK\n"
    (tmp_path / "wheels" / "a b.whl").write_bytes(b"other")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("found", "asked", "fits"),
    [
        ("2.11.0+cu130", ">=2.11", True),
        ("2.10.1", ">=2.11", False),
        ("5.17.0", ">=5,<6", True),
        ("6.0.0", ">=5,<6", False),
        ("2.12.0a0+nv26.1", ">=2.11", True),
        (None, "", False),
    ],
)
def test_in_range(monkeypatch, found, asked, fits):
    monkeypatch.setattr(resolve, "version_of", lambda name: found)
    assert resolve.in_range("any", asked) is fits


def test_a_pin_without_a_wheel_for_the_target_is_named(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"numpy==2\.4\.6 has no wheel for Python 3\.12 on manylinux_2_28_x86_64"):
        build.download(["numpy==2.4.6"], tmp_path, "3.12", "manylinux_2_28_x86_64")


@pytest.mark.parametrize(
    ("wheel", "file"), [("x-1-py3-none-any.whl", "x/op.so.1"), ("x-1-cp311-cp311-linux_x86_64.whl", "x/op.py")]
)
def test_a_wheel_that_is_built_here_has_no_binaries(tmp_path, monkeypatch, wheel, file):
    def pip(*_: object, **__: str) -> None:
        with ZipFile(tmp_path / wheel, "w") as archive:
            archive.writestr(file, "")

    monkeypatch.setattr(build, "pip", pip)
    with pytest.raises(UserError, match="is made for this machine"):
        build.build("x==1", tmp_path)


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "build_ours", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.write_bundle(tmp_path / "bundle", "3.12", "manylinux_2_28_x86_64", ["train"], [])
    assert not list(tmp_path.iterdir())
