"""``make bundle``: write what training needs beside Python and torch, for a machine without a network.

Which packages these are is read from the metadata of what this environment has installed, or else of their wheels, with
the target's markers; their versions are those of ``constraints.txt``. pip downloads their wheels; DeepSpeed, which has
none, is built here. Beside them lie the tests and benchmarks of a device, which need nothing else.
"""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fft.data.owner import atomic_folder
from fft.errors import Parser, UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
OURS = "flash-fine-tuning"
#: What the bundle is installed with: it runs from its wheel, so that the target needs no pip of its own.
INSTALLER = "pip==26.3"
#: What belongs to the device, and is the target's own.
DEVICE = re.compile(r"torch|torch-npu|triton|flash-attn|vllm|(nvidia|cuda)-.+")
#: What has no wheel on PyPI, and what makes it one without binaries.
BUILT = {"deepspeed": {"DS_BUILD_OPS": "0"}}
#: What else is carried, under which name.
CARRIED = {"benchmarks": "benchmarks", "tests/device": "tests/device", "bundle/device.mk": "Makefile"}
CARRIED |= {f"bundle/{name}": name for name in ("install.sh", "resolve.py")} | {"docs/metal.md": "README.md"}
_BINARY = re.compile(r"\.(so|a|o|pyd|dll|dylib)(\.\d+)*$")
_PLATFORM = re.compile(r"manylinux_2_(\d+)_(\w+)")
#: Older names of manylinux_2_N.
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}

Requires = Callable[[str], Iterable[str]]


def pins(constraints: Path) -> dict[str, str]:
    """Package to version, from lines ``name==version``."""
    lines = [line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def target_environment(python: str, platform: str) -> dict[str, str]:
    """What markers are evaluated with, such as ``python_version < "3.12"``."""
    machine = _manylinux(platform)[1]
    linux = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    versions = {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"}
    return {**default_environment(), **linux, **cpython, **versions}


def platforms(platform: str) -> list[str]:
    """All platform tags whose wheels run on one, the newest first. Raises :class:`UserError` if it is no manylinux.

    pip takes a ``--platform`` to the letter, and a wheel for glibc 2.17 runs on 2.28 as well.
    """
    newest, machine = _manylinux(platform)
    tags = []
    for minor in range(newest, 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        tags += [f"{_LEGACY[minor]}_{machine}"] if minor in _LEGACY else []
    return tags


def _manylinux(platform: str) -> tuple[int, str]:
    """glibc's minor version, and the machine."""
    match = _PLATFORM.fullmatch(platform)
    if not match:
        raise UserError(f"{platform} is no platform of Linux wheels: name one such as manylinux_2_28_x86_64.")
    return int(match[1]), match[2]


def closure(
    root: Requirement,
    requires: Requires,
    pinned: Mapping[str, str],
    environment: Mapping[str, str],
    system: Sequence[str],
) -> dict[str, str]:
    """Package to version: all that ``root`` needs, but not itself, nor the device's packages, nor those of ``system``.

    What only these need is left out with them. Raises :class:`UserError` for what has no pin, or one out of range.
    """
    left_out = {canonicalize_name(name) for name in system}
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [root]
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if DEVICE.fullmatch(name) or name in left_out:
            continue
        if name != canonicalize_name(root.name):
            if name not in pinned:
                raise UserError(f"{name} is not pinned in constraints.txt: install it, and pin the version you tested.")
            if not wanted.specifier.contains(pinned[name], prereleases=True):
                raise UserError(f"constraints.txt pins {name} {pinned[name]}, but {wanted} is needed: change the pin.")
            found[name] = pinned[name]
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += [r for r in map(Requirement, requires(name)) if _applies(r, extras, environment)]
    return found


def _applies(requirement: Requirement, extras: Iterable[str], environment: Mapping[str, str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def published(pinned: Mapping[str, str]) -> Requires:
    """What packages say they require: this environment's, which must be the pinned versions, or else their wheels."""

    def requires(name: str) -> Iterable[str]:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return wheel_requires(f"{name}=={pinned[name]}")
        if name in pinned and package.version != pinned[name]:
            raise UserError(f"{name} {package.version} is installed, {pinned[name]} is pinned: run make env.")
        return package.requires or ()

    return requires


def wheel_requires(package: str) -> Sequence[str]:
    """The same of a package that is not installed. Raises :class:`UserError` if it has no wheel for any platform."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, package)
        return read_metadata(next(Path(folder).iterdir())).get_all("Requires-Dist", [])


def read_metadata(wheel: Path) -> email.message.Message:
    """A wheel's ``METADATA``: ``Requires-Dist``, ``Provides-Extra`` and the rest."""
    with ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(file))


def sums(folder: Path) -> str:
    """A line a file below ``folder``, as ``sha256sum --check`` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files)


def build_ours(folder: Path) -> Path:
    """Build this repository's wheel into ``folder``, from a copy, so that nothing old gets into it."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("fft", "spark_jobs"):
            shutil.copytree(ROOT / name, Path(copy) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        return build(copy, folder)


def build(source: str, folder: Path) -> Path:
    """Build a wheel that runs on any machine. Raises :class:`UserError` if it fails, or has binaries for this one."""
    before = set(folder.iterdir())
    variables = BUILT.get(source.partition("==")[0], {})
    # What the cache holds may have been built with binaries.
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", folder, source, **variables)
    wheel = (set(folder.iterdir()) - before).pop()
    with ZipFile(wheel) as archive:
        binaries = [name for name in archive.namelist() if _BINARY.search(name)]
    if binaries or not wheel.name.endswith("-py3-none-any.whl"):
        raise UserError(f"{wheel.name} is made for this machine ({', '.join(binaries[:3])}), not for the target.")
    return wheel


def download(packages: Iterable[str], folder: Path, python: str, platform: str) -> None:
    """Download wheels for the target. Raises :class:`UserError` with the package that has none."""
    tags = [word for tag in platforms(platform) for word in ("--platform", tag)]
    target = ("--only-binary=:all:", "--implementation", "cp", "--python-version", python, *tags)
    try:
        pip("download", "--no-deps", *target, "--dest", folder, *packages)
    except UserError as error:
        missing = re.search(r"No matching distribution found for ([^\s]+)", str(error))
        if not missing:
            raise
        raise UserError(
            f"{missing[1]} has no wheel for Python {python} on {platform}: choose another target, or another pin."
        ) from None


def pip(*arguments: object, **variables: str) -> None:
    """Run this environment's pip. Raises :class:`UserError` with what it complained of."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(f"pip {arguments[0]} failed: {' '.join(said) or done.stderr.strip()[-1000:]}")


def write_bundle(output: Path, python: str, platform: str, extras: Sequence[str], system: Sequence[str]) -> None:
    """Write the folder ``output``, whole or not at all. Raises :class:`UserError` for what cannot be had."""
    with atomic_folder(output) as staging:
        wheels = staging / "wheels"
        wheels.mkdir()
        ours = read_metadata(build_ours(wheels))
        found = needs_of_ours(ours, target_environment(python, platform), extras, system)
        for name in sorted(found.keys() & BUILT.keys()):
            build(f"{name}=={found[name]}", wheels)
        rest = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in BUILT]
        download([INSTALLER, *rest], wheels, python, platform)
        requirements = sorted({**found, OURS: ours["Version"]}.items())
        (staging / "requirements.txt").write_text("".join(f"{n}=={v}\n" for n, v in requirements), encoding="utf-8")
        target = f"python={python}\nplatform={platform}\nextras={','.join(extras)}\n"
        (staging / "target").write_text(target, encoding="utf-8")
        for source, name in CARRIED.items():
            copy(ROOT / source, staging / name)
        (staging / "SHA256SUMS").write_text(sums(staging), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """A file or a folder, without what running it left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def needs_of_ours(
    ours: email.message.Message, environment: Mapping[str, str], extras: Sequence[str], system: Sequence[str]
) -> dict[str, str]:
    """Package to version, all but ours. Raises :class:`UserError` for an extra that we do not have."""
    unknown = set(extras) - set(ours.get_all("Provides-Extra", []))
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: pyproject.toml has no such extra.")
    pinned = pins(ROOT / "constraints.txt")
    others = published(pinned)

    def requires(name: str) -> Iterable[str]:
        return ours.get_all("Requires-Dist", []) if name == OURS else others(name)

    return closure(Requirement(f"{OURS}[{','.join(extras)}]"), requires, pinned, environment, system)


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="bundle/build.py", description="Write a folder that installs on a machine without a network.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "bundle", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--python_version", default="3.12", metavar="X.Y", help="the target's Python (%(default)s)")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", metavar="TAG", help="the target's (%(default)s)")
    parser.add_argument(
        "--extras", nargs="*", default=["train", "device"], metavar="NAME", help="of pyproject.toml (train device)"
    )
    parser.add_argument(
        "--system", nargs="*", default=[], metavar="NAME", help="packages that the target has: left out"
    )
    return parser


def main() -> None:
    """Write the bundle; say how large it is, and of what."""
    args = build_parser().parse_args()
    write_bundle(args.output, args.python_version, args.platform, args.extras, args.system)
    files = sorted(((f.stat().st_size, f.name) for f in args.output.rglob("*") if f.is_file()), reverse=True)
    for size, name in (file for file in files if file[0] > 1e6):
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(size for size, _ in files) / 1e6:8.1f} MB  {args.output}")


if __name__ == "__main__":
    run_cli(main)
