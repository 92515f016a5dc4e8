"""Walk through a page: its commands and its Python, word for word, but for what a test's table puts in their place."""

import glob
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace

from conftest import ROOT
from forked import run_ranks
from pages import blocks
from torch.distributed.run import get_args_parser

#: The pages that have a journey of their own, which takes all their fenced commands, and their Python.
JOURNEYS = [
    page
    for test in sorted((ROOT / "tests" / "journeys").glob("test_*.py"))
    for page in re.findall(r'^PAGE = "(.+)"$', test.read_text(encoding="utf-8"), re.MULTILINE)
]


def commands_of(page: str, places: Mapping[str, object]) -> list[list[str]]:
    """The fenced commands of a page, but for those that need what is not here. ``places`` say what stands here for
    names and sizes of the page; each has to occur."""
    fenced = [block for block in blocks(page) if block.language == "bash" and not block.needs]
    texts = _placed([block.text for block in fenced], places)
    return [words for block, text in zip(fenced, texts, strict=True) for words in replace(block, text=text).commands]


def python_of(page: str, places: Mapping[str, object]) -> str:
    """The Python of a page, one piece behind the other."""
    return "\n".join(_placed([block.text for block in blocks(page) if block.language == "python"], places))


def _placed(texts: list[str], places: Mapping[str, object]) -> list[str]:
    pattern = re.compile("|".join(re.escape(name) for name in sorted(places, key=len, reverse=True)))
    missing = set(places) - {match[0] for text in texts for match in pattern.finditer(text)}
    assert not missing, f"the page has no {missing}"
    return [pattern.sub(lambda match: str(places[match[0]]), text) for text in texts]


def walk(command: list[str]) -> str:
    """Run ``python -m ...``; what it printed."""
    python, dash_m, module, *flags = command
    assert (python, dash_m) == ("python", "-m"), command
    words = [word for flag in flags for word in (sorted(glob.glob(flag)) if "*" in flag else [flag])]
    return told(run_ranks(1, *words, module=module))


def launch_all(commands: list[list[str]]) -> str:
    """The same command of torchrun on each of several machines, whose ranks all run here."""
    read = [get_args_parser().parse_args(command[1:]) for command in commands]
    nodes = {int(asked.nnodes) for asked in read}
    assert nodes == {len(read)}
    assert [asked.node_rank for asked in read] == list(range(len(read)))
    (flags,) = {(asked.training_script, *asked.training_script_args) for asked in read}
    (each,) = {int(asked.nproc_per_node) for asked in read}
    assert flags[0] == "fft/train.py"
    return told(run_ranks(each * len(read), *flags[1:]))


def told(done: subprocess.CompletedProcess) -> str:
    """What a command printed, on both streams. It must have ended well."""
    assert done.returncode == 0, f"{done.args}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr
