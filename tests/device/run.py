"""Everything that a device must prove: groups of tests, most valuable first, each in a process with a time limit.

    python tests/device/run.py --device cuda                 # all groups; a table, and report.json beside it
    python tests/device/run.py --device cuda --group ring    # one of them
    python tests/device/run.py --device cuda --jobs 4        # four at a time, where the device has room for them
    python tests/device/run.py --device cuda --minutes 5     # what has not ended by then is stopped

Needs torch with the device and what `bundle/install.sh` installs. A group that hangs is stopped, and the next begins.
Exit codes: 0 all passed, 1 a test failed or a group was stopped, 2 there is no such device.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.device.machine import look, unlaunched  # noqa: E402 - found after the line above

#: How much longer a group may take in a rehearsal, on cores that others may use.
PATIENCE = 5
#: Seconds that a group may take on a device. The file of a group is test_GROUP.py.
LIMITS = {
    "training": 180,
    "kernels": 240,
    "ring": 90,
    "operators": 120,
    "loss": 60,
    "recomputation": 150,
    "families": 150,
    "compile": 150,
    "checkpoint": 300,
    "offload": 90,
    "memory": 240,
    "triton": 90,
}
#: NVIDIA's images set it, and products of float32 are of TF32 then, which has 11 bits: too few for what is compared.
TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


@dataclass
class Group:
    """What became of a group: ``tests`` as conftest.py tells them, and ``end``: "passed", "failed" or why neither."""

    name: str
    end: str
    seconds: float
    tests: list[dict] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """So many tests ended so."""
        return sum(test["outcome"] == outcome for test in self.tests)


def main() -> int:
    """Run the groups asked for; print the table, write the report."""
    args = build_parser().parse_args()
    facts = look(args.device)
    if facts is None:
        return 2
    groups: list[Group] = []
    deadline = time.monotonic() + 60 * args.minutes
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(run, name, args, deadline) for name in args.group or LIMITS]
        for done in as_completed(waiting):
            groups.append(done.result())
            print(line(groups[-1]), file=sys.stderr, flush=True)
            write(args.report, facts, groups)  # now: the machine may be gone before the last
    print(table(facts, groups))
    print(f"written to {args.report}", file=sys.stderr)
    return 0 if all(group.end in ("passed", "nothing to run") for group in groups) else 1


def run(name: str, args: argparse.Namespace, deadline: float) -> Group:
    """Run a group; what its tests told by then is kept where it is stopped."""
    limit = LIMITS[name] * args.jobs * (PATIENCE if args.device == "cpu" else 1)
    limit = round(min(limit, deadline - time.monotonic()))
    if limit <= 0:
        return Group(name, "not begun: time is up", 0.0)
    print(f"{name} (at most {limit} s) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={HERE}", f"--confcutdir={HERE}"]
    environment = unlaunched()
    environment.pop(TF32, None)
    # Groups side by side that each start a thread on every core are slower than one after another.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // args.jobs)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        command += ["-c", HERE / "pytest.ini", "--device", args.device, "--results", results, HERE / f"test_{name}.py"]
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=sys.stderr, start_new_session=True
        )
        try:
            code = process.wait(limit)
            end = {0: "passed", 5: "nothing to run"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit} s"
        finally:
            stop(process)
        tests = (
            [json.loads(told) for told in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
        )
    if end == "passed" and not any(test["outcome"] == "passed" for test in tests):
        end = "nothing to run"
    return Group(name, end, time.monotonic() - begun, tests)


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started: ranks of a hung run would hold the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def line(group: Group) -> str:
    """A group in a line."""
    counts = ", ".join(f"{group.count(o)} {o}" for o in ("passed", "failed", "skipped"))
    return f"{group.name:<14} {group.end:<20} {counts} in {group.seconds:.0f} s"


def table(facts: dict, groups: list[Group]) -> str:
    """All groups, then each test that failed and each reason for which some were skipped."""
    lines = [f"{facts['device']}, {', '.join(f'{name} {v}' for name, v in facts['versions'].items())}", ""]
    lines += [line(group) for group in groups]
    for group in groups:
        for test in group.tests:
            if test["outcome"] == "failed":
                lines += ["", f"{group.name}: {test['test']}", *test["reason"].splitlines()[-5:]]
    reasons = sorted(
        {(group.name, test["reason"]) for group in groups for test in group.tests if test["outcome"] == "skipped"}
    )
    lines += (
        ["", *(f"skipped of {name}: {reason.removeprefix('Skipped: ')}" for name, reason in reasons)] if reasons else []
    )
    return "\n".join(lines)


def write(path: Path, facts: dict, groups: list[Group]) -> None:
    """The report, whole."""
    told = facts | {"groups": [asdict(group) for group in groups]}
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(json.dumps(told, indent=1), encoding="utf-8")
    staged.replace(path)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "npu", "cpu"), required=True, help="cpu: a rehearsal in small sizes"
    )
    parser.add_argument("--group", nargs="*", choices=list(LIMITS), help="which groups (all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="groups at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="for all groups together (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("report.json"), metavar="FILE", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
