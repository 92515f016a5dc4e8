"""What a device does in a training step, part by part, with its matrix rate and memory bandwidth beside every table.

    python -m benchmarks.device --device cuda                # every part, at most 8 minutes; called again, it goes on
    python -m benchmarks.device --device cuda --part step    # one part
    python -m benchmarks.device --device cuda --part step --case "8B, rows of 8192"   # cases with that in their names
    python -m benchmarks.device --device cpu --smallest      # a rehearsal: every line runs, no figure means anything

Figures are kept in --results as soon as a case is measured. A case that fails is told with its reason, and is measured
again by --again alone. Exit codes: 0 all is measured, 1 a case failed, 2 refused, 75 time is up and some are left.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from benchmarks.device.machine import ROOT, look
from fft.console import format_table

#: Most wanted first: a device may be there for minutes.
PARTS = ("hardware", "attention", "step", "loss", "memory", "checkpoint", "loader")
#: Seconds after which a case is given up.
CASE_LIMIT = 240
EXIT_LEFT = 75
#: Exit code of a process whose case failed: what that left on the device goes with it, the next case has a new one.
RENEW = 3


def main() -> int:
    """Measure what is missing, print all that is there."""
    args = build_parser().parse_args()
    if args.worker:
        return work(args)
    results, deadline = open_results(args), time.monotonic() + 60 * args.minutes
    if results is None:
        return 2
    parts = args.part or PARTS
    if args.again:
        for part in parts:
            results["parts"].pop(part, None)
    whole = all([measure(part, args, results, deadline) for part in parts])
    show(results, parts)
    failed = any("failed" in case for part in parts for case in results["parts"].get(part, {}).values())
    return EXIT_LEFT if not whole else int(failed)


def open_results(args: argparse.Namespace) -> dict | None:
    """What was measured before on this device, or nothing yet; None, once told, for that of another."""
    facts = look(args.device)
    if facts is None:
        return None
    facts["smallest"] = args.smallest
    if not args.results.exists():
        return facts | {"parts": {}}
    results = json.loads(args.results.read_text(encoding="utf-8"))
    for key in ("device", "versions", "smallest"):
        if results[key] != facts[key]:
            print(
                f"error: {args.results} is of another {key} ({results[key]}, not {facts[key]}): name another file with "
                "--results, or remove it.",
                file=sys.stderr,
            )
            return None
    return results


def measure(part: str, args: argparse.Namespace, results: dict, deadline: float) -> bool:
    """Measure the cases of a part that are missing, each process replaced where it dies; whether all are done."""
    cases = results["parts"].setdefault(part, {})
    cases.pop("(start)", None)  # a part that could not begin may now
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder, "told")
            code, current = run_worker(part, args, cases, told, deadline)
            for line in read(told):
                if "rows" in line or "failed" in line:
                    cases[line.pop("case")] = line
            if current is not None and current not in cases and time.monotonic() < deadline:
                how = f"took more than {CASE_LIMIT} s" if code is None else f"the process ended with exit code {code}"
                cases[current] = {"failed": how, "seconds": 0.0}
            elif code not in (0, None, RENEW):
                cases["(start)"] = {"failed": f"the process ended with exit code {code}", "seconds": 0.0}
        write(args.results, results)
        if code == 0 or "(start)" in cases:
            return code == 0
    return False


def run_worker(
    part: str, args: argparse.Namespace, cases: dict, told: Path, deadline: float
) -> tuple[int | None, str | None]:
    """Run a process for the cases of a part; its exit code (None: it was ended), and the case it was at."""
    command = [sys.executable, "-m", "benchmarks.device", "--device", args.device, "--worker", part, "--results", told]
    command += ["--smallest"] if args.smallest else []
    command += ["--case", *args.case] if args.case else []
    told.write_text(json.dumps({"measured": list(cases)}) + "\n", encoding="utf-8")
    environment = {**os.environ, "DS_ACCELERATOR": args.device}  # a rehearsal beside a GPU leaves that alone
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=sys.stderr, start_new_session=True
    )
    while True:
        try:
            code = process.wait(1)
            break
        except subprocess.TimeoutExpired:
            current = [line for line in read(told) if "begun" in line]
            slow = current and time.time() - current[-1]["begun"] > CASE_LIMIT
            if time.monotonic() > deadline or slow:
                os.killpg(process.pid, signal.SIGKILL)  # with what a case has started
                process.wait()
                code = None
                break
    begun = [line["case"] for line in read(told) if "begun" in line]
    return code, begun[-1] if begun else None


def work(args: argparse.Namespace) -> int:
    """The process of a part: a line as a case begins, a line when it is done."""
    import torch

    from benchmarks.device.frame import Setting, free

    if args.device == "npu":
        import torch_npu  # noqa: F401 - registers torch.npu
    device = torch.device(args.device, 0) if args.device != "cpu" else torch.device("cpu")
    measured = read(args.results)[0]["measured"]
    with open(args.results, "a", encoding="utf-8") as stream:

        def tell(**line: object) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        for name, case in importlib.import_module(f"benchmarks.device.{args.worker}").cases(
            Setting(device, args.smallest)
        ):
            if name in measured or not any(asked in name for asked in args.case or [""]):
                continue
            print(f"{args.worker}: {name} ...", file=sys.stderr, flush=True)
            begun = time.time()
            tell(case=name, begun=begun)
            free(device)
            try:
                found = {"rows": case()}
            except Exception as error:  # whatever a device may raise is a result, and the next case goes on
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
            tell(case=name, seconds=time.time() - begun, **found)
            if "failed" in found:
                return RENEW
    return 0


def read(path: Path) -> list[dict]:
    """The whole lines of a file that a process may be writing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def show(results: dict, parts: tuple[str, ...]) -> None:
    """Print the tables, the device's own rates before each."""
    hardware = [row for case in results["parts"].get("hardware", {}).values() for row in case.get("rows", [])]
    figures = [(key, value) for row in hardware for key, value in row.items() if isinstance(value, float)]
    rates = ", ".join(f"{key} {value:.4g}" for key, value in figures)
    for part in parts:
        cases = results["parts"].get(part, {})
        print(f"\n{part} on {results['device']}" + (f" ({rates})" if rates else ""))
        for header, rows in tables(row for case in cases.values() for row in case.get("rows", [])):
            print(format_table(header, [[row.get(key, "") for key in header] for row in rows]))
        for name, case in cases.items():
            if "failed" in case:
                print(f"{name} failed: {case['failed']}")


def tables(rows: Iterable[dict]) -> list[tuple[list[str], list[dict]]]:
    """Rows of the same columns in one table; one that lacks some, for it has a note instead, is put with the others."""
    found: list[tuple[list[str], list[dict]]] = []
    for row in sorted(rows, key=len, reverse=True):
        home = next((table for table in found if set(row) - {"note"} <= set(table[0])), None)
        if home is None:
            found.append(home := (list(row), []))
        home[0].extend(key for key in row if key not in home[0])
        home[1].append(row)
    return found


def write(path: Path, results: dict) -> None:
    """Keep what was measured, whole."""
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(json.dumps(results, indent=1), encoding="utf-8")
    staged.replace(path)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "npu", "cpu"), required=True, help="what is measured")
    parser.add_argument("--part", nargs="*", choices=PARTS, help="which parts (all)")
    parser.add_argument("--case", nargs="*", metavar="TEXT", help="cases whose name has one of these in it (all)")
    parser.add_argument("--smallest", action="store_true", help="the smallest sizes, to see that every line runs")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop; the next call goes on (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("bench.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
