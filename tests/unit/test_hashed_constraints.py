"""What `make` installs into its environments is what was pinned, file by file; only torch has no hashes."""

import re
import subprocess
import sys
from hashlib import sha256
from zipfile import ZipFile

import pytest
from conftest import ROOT

LISTS = ("constraints", "constraints-serve", "constraints-docs")


def versions(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].split() for line in (ROOT / f"{name}.txt").read_text().splitlines()]
    pins = [line[0].partition("==") for line in lines if line]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, _, version in pins}


@pytest.mark.parametrize("name", LISTS)
def test_every_version_but_torch_s_has_hashes(name):
    """After a change of versions: make lock."""
    pinned = versions(name)
    assert bool(pinned.pop("torch", None)) == (name != "constraints-docs")
    assert versions(f"{name}-hashed") == pinned
    for line in (ROOT / f"{name}-hashed.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+", line)


def test_nothing_but_torch_is_fetched_without_a_hash():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipes = re.findall(r"^\$\((?:\w+_)?STAMP\):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(recipes) == len(LISTS)
    (hashed,) = re.findall(r"^hashed = (.*)$", makefile, re.MULTILINE)
    assert "--require-hashes" in hashed
    assert "--no-deps" in hashed
    installing = [line for recipe in recipes for line in recipe.splitlines() if re.search(r" install |\(call ", line)]
    assert len(installing) > 9
    for line in installing:
        assert "call hashed," in line or "--no-index" in line or "own_torch" in line or "'^torch=='" in line, line


def test_a_file_of_another_hash_is_refused(tmp_path):
    """As pip reads the lines that we write."""
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with ZipFile(wheel, "w") as out:
        out.writestr("a-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: a\nVersion: 1\n")
        out.writestr("a-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr("a-1.dist-info/RECORD", "")

    def install(text: str) -> subprocess.CompletedProcess:
        (tmp_path / "hashed.txt").write_text(text)
        given = ["--no-index", "--find-links", tmp_path, "--target", tmp_path / "to", "-r", tmp_path / "hashed.txt"]
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", *given]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    right, wrong = sha256(wheel.read_bytes()).hexdigest(), "0" * 64
    assert install(f"a==1 --hash=sha256:{wrong} --hash=sha256:{right}\n").returncode == 0
    refused = install(f"a==1 --hash=sha256:{wrong}\n")
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert install("a==1\n").returncode != 0
