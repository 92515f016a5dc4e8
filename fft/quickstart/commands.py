"""The product's commands as stages of a quickstart: run from the repository, as a user would type them."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fft
from fft.console import say
from fft.errors import Parser, UserError, positive
from fft.quickstart.places import Lake, Place, manifest_at
from fft.quickstart.stages import Record, Stage, run_command, run_stages

#: The repository: Spark jobs and configuration are run from there.
ROOT = Path(fft.__file__).resolve().parent.parent


@dataclass(frozen=True)
class QuickstartPlace:
    """Where everything of a quickstart lies, below ``output``; but for what it notes of its stages, if that is a URL,
    below ``notes``, on a disk."""

    output: Place
    notes: Path | None = None

    @property
    def tokens(self) -> Place:
        """Table with one row a document, or a chat."""
        return self.output / "tokens"

    @property
    def run(self) -> Place:
        """The trainer's run folder."""
        return self.output / "run"

    @property
    def model(self) -> Place:
        """Hugging Face model directory."""
        return self.output / "model"

    @property
    def records(self) -> Path:
        """Records of finished stages."""
        notes = self.notes or self.output
        if not isinstance(notes, Path):
            raise TypeError(f"records of stages lie on a disk, not at {notes}")
        return notes / ".stages"


def quickstart_parser(name: str, config: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Flags of the quickstart ``name``, a dotted module, whose training is configured by the file ``config``."""
    folder = "-".join(name.split(".")[1:])
    parser = Parser(prog=f"python -m {name}", description=description, epilog=epilog)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / folder, metavar="DIR", help=f"default: runs/{folder}"
    )
    parser.add_argument("--max_steps", type=positive, help=f"steps of the training (default: as in {config})")
    return parser


def check_checkout(path: str) -> None:
    """Raise :class:`UserError` outside a checkout, which has this file."""
    if not (ROOT / path).is_file():
        raise UserError(f"{ROOT / path} does not exist: the quickstart runs from a checkout of the repository.")


def finished_stages(stages: Sequence[Stage], place: QuickstartPlace) -> dict[str, Record] | None:
    """Run what is not done yet: the records of all stages, or None where that was interrupted, which is told."""
    try:
        return run_stages(stages, place.records, say)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on with the stage that was running")
        return None


def check_place(place: QuickstartPlace, config: str) -> None:
    """Raise :class:`UserError` outside a checkout with the file ``config``, and where the output folder of a quickstart
    holds something else."""
    output, records = place.output, place.records
    check_checkout(config)
    if isinstance(output, Lake):
        if not records.is_dir() and output.states():
            raise UserError(f"--lake {output} holds something already: choose another prefix.")
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not records.is_dir():
        raise UserError(f"--output {output} holds something else than a quickstart: choose another folder.")


def spark_stage(name: str, flags: tuple[str, ...], inputs: tuple[Place, ...], output: Place) -> Stage:
    """The job ``name`` as a stage that makes ``output``; with ``FFT_ENGINE=sail``, on Sail."""
    launcher = "python" if os.environ.get("FFT_ENGINE") == "sail" else "spark-submit"
    command = (launcher, f"spark_jobs/{name}.py", *flags, "--overwrite")
    # A laptop's host name often resolves to nothing; one machine needs no more than the loopback address.
    variables = {"SPARK_LOCAL_IP": os.environ.get("SPARK_LOCAL_IP", "127.0.0.1"), "PYSPARK_PYTHON": sys.executable}

    def work() -> dict:
        run_command(name, command, ROOT, variables)
        return {}

    return Stage(name, command, inputs, (output,), work)


def run_trainer(command: Sequence[str]) -> dict:
    """Run a command of DeepSpeed's launcher, on this machine's cores. Raises :class:`UserError` when it fails."""
    # DeepSpeed's own choice of port fails while another of its jobs runs on this machine.
    launcher = ("--quiet", "--master_addr", "127.0.0.1", "--master_port", str(_free_port()))
    # As many processes as are asked for on any machine, also on one with a single GPU.
    run_command("train", [command[0], *launcher, *command[1:]], ROOT, {"DS_ACCELERATOR": "cpu"})
    return {}


def spark_rate(table: Place) -> tuple[int, float]:
    """Tokens of a table, and tokens/s at which its job wrote it. Raises :class:`UserError` without a manifest."""
    manifest = manifest_at(table)
    if manifest is None:
        raise UserError(f"{table} has no manifest: remove it and run the quickstart again.")
    return manifest.tokens, manifest.lineage["timing"]["tokens_per_second"]


def shown(path: Place) -> str:
    """As a user in the repository's root would type it."""
    return str(path.relative_to(ROOT) if isinstance(path, Path) and path.is_relative_to(ROOT) else path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
