"""What of the bundle a machine needs beside what it has. Part of install.sh, run by the target's own Python.

``resolve.py`` tells on stderr what is taken from the system, and whether it is in range, and prints the wheels to
install, a path a line. ``resolve.py --venv DIR`` makes an environment that sees the system's packages. Exit code 2 and
one sentence: this machine lacks what the bundle does not carry.
"""

import email
import json
import os
import site
import subprocess
import sys
import tempfile
import venv
from email.message import Message
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse
from zipfile import ZipFile

BUNDLE = Path(__file__).resolve().parent
WHEELS = BUNDLE / "wheels"
OURS = "flash-fine-tuning"


class Refusal(Exception):
    """Why the bundle is not for this machine, and the remedy."""


def main(arguments: list[str]) -> int:
    """Make an environment, or resolve."""
    if arguments[:1] == ["--venv"]:
        make_venv(Path(arguments[1]))
        return 0
    # `packaging` and pip are the bundle's own: the machine may have neither.
    sys.path.insert(0, str(wheel_of("pip")))
    try:
        target = dict(line.split("=", 1) for line in (BUNDLE / "target").read_text(encoding="utf-8").splitlines())
        ranges = wanted(target["extras"].split(","))
        check_platform(target["platform"])
        check_system(ranges)
        wheels = resolve(target["extras"], ranges)
        tell_system(ranges, {wheel.name.split("-")[0].replace("_", "-").lower() for wheel in wheels})
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    print("\n".join(map(str, wheels)))
    return 0


def wheel_of(name: str) -> Path | None:
    """The bundle's wheel of a package, if it carries one."""
    return next(WHEELS.glob(f"{name.replace('-', '_').lower()}-*.whl"), None)


def wanted(extras: list[str]) -> dict[str, str]:
    """Package to range, as our wheel asks for them."""
    from pip._vendor.packaging.requirements import Requirement

    with ZipFile(wheel_of(OURS)) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        ours: Message = email.message_from_bytes(archive.read(file))
    lines = [Requirement(line) for line in ours.get_all("Requires-Dist", [])]
    active, before = {"", *extras}, set()
    while active != before:  # an extra may ask for another
        before = active
        chosen = [line for line in lines if not line.marker or any(line.marker.evaluate({"extra": e}) for e in active)]
        active = active.union(*(line.extras for line in chosen if line.name == OURS))
    return {line.name: str(line.specifier) for line in chosen if line.name != OURS}


def check_platform(platform: str) -> None:
    """Refuse another platform than the wheels are for."""
    from pip._vendor.packaging.tags import platform_tags

    own = list(platform_tags())
    if platform not in own:
        raise Refusal(f"the bundle is for {platform}: make one for this machine with PLATFORM={own[0]}.")


def check_system(ranges: dict[str, str]) -> None:
    """Refuse a machine where something is missing or out of range that the bundle does not carry."""
    for name, asked in ranges.items():
        if wheel_of(name) or in_range(name, asked):
            continue
        found = version_of(name)
        state = f"{name} {found} is out of range" if found else f"{sys.executable} has no {name}"
        raise Refusal(
            f"{state}, {name}{asked} is needed and not in the bundle: install it there, or name another Python with "
            "--python."
        )


def version_of(name: str) -> str | None:
    """The version that the system has."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def in_range(name: str, asked: str) -> bool:
    """Whether the system has a version in range."""
    from pip._vendor.packaging.specifiers import SpecifierSet

    found = version_of(name)
    return found is not None and SpecifierSet(asked).contains(found, prereleases=True)


def resolve(extras: str, ranges: dict[str, str]) -> list[Path]:
    """The wheels that complete the system, found by pip in an environment that is thrown away.

    pip keeps what is installed and in range, and judges by what each installed package asks for itself: the system's
    transformers keeps the tokenizers it wants. What torch needs is the system's business and not looked at, since
    images of a device's maker often say less than they have.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages, report = make_venv(Path(folder)), Path(folder) / "report.json"
        if "torch" in ranges:
            stub = packages / "torch.dist-info"
            stub.mkdir()
            lines = f"Metadata-Version: 2.1\nName: torch\nVersion: {version_of('torch')}\n"
            (stub / "METADATA").write_text(lines, encoding="utf-8")
        command = [f"{folder}/bin/python", f"{wheel_of('pip')}/pip", "install", "--isolated", "--quiet", "--dry-run"]
        source = ["--no-index", "--find-links", str(WHEELS), "--report", str(report), f"{OURS}[{extras}]"]
        done = subprocess.run([*command, *source], capture_output=True, text=True, env=quiet())
        if done.returncode:
            said = " ".join(line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip())
            raise Refusal(f"the bundle does not complete what {sys.executable} has: {said}")
        urls = [each["download_info"]["url"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return [Path(unquote(urlparse(url).path)) for url in urls]


def quiet() -> dict[str, str]:
    """This process's variables without those that steer pip or Python's path."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONHOME"))}


def make_venv(folder: Path) -> Path:
    """Make an environment that sees what this Python sees; its site-packages.

    Where this Python is an environment itself, ``--system-site-packages`` would mean those of the Python below it.
    """
    nested = sys.prefix != sys.base_prefix
    venv.EnvBuilder(system_site_packages=not nested, symlinks=True).create(folder)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if nested:
        seen = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
        (packages / "system.pth").write_text("".join(lines), encoding="utf-8")
    return packages


def tell_system(ranges: dict[str, str], bundled: set[str]) -> None:
    """Say what comes from where."""
    rows = [("", "system", "in range", "taken from")]
    rows.append(("python", sys.version.split()[0], "yes", "the system"))
    if "torch" in ranges:
        rows.append(("torch", version_of("torch") or "", f"yes ({ranges['torch']})", "the system"))
        rows.append(("cuda", cuda_of_torch(), "as torch has it", "the system"))
        rows.append(("triton", version_of("triton") or "none", "as torch has it", "the system"))
    for name, asked in ranges.items():
        if name != "torch":
            state = "yes" if in_range(name, asked) else "no"
            source = "the bundle" if name in bundled else "the system"
            rows.append((name, version_of(name) or "none", f"{state} ({asked or 'any'})", source))
    for row in rows:
        print("  {:<14}{:<16}{:<20}{}".format(*row), file=sys.stderr)


def cuda_of_torch() -> str:
    """The CUDA that torch was built for. Refuses a torch that does not load."""
    code = "import torch; print(torch.version.cuda or 'none')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise Refusal(f"torch of {sys.executable} does not load ({' '.join(said)}): mend it first.")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
