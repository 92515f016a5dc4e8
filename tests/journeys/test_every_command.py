"""Every command of README, docs and examples is walked through by a journey, is one that its program takes, or says
what it needs."""

import re
import runpy
import tomllib

import pytest
from conftest import ROOT
from pages import PAGES, Block, blocks
from torch.distributed.run import get_args_parser

from fft.arguments import parse_arguments
from fft.errors import Parser, UserError

#: By what a command begins with, which parser reads the rest.
PARSERS: dict[str, Parser] = {}
for _make in runpy.run_path(str(ROOT / "docs" / "flags.py"))["_PARSERS"]:
    PARSERS[_make().prog.removeprefix("spark-submit ").removeprefix("python -m ")] = _make()
PARSERS["fft.train"] = PARSERS["fft/train.py"]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MAKEFILES = [(ROOT / name).read_text() for name in ("Makefile", "bundle/device.mk")]
#: What a page writes in place of what its reader knows.
PLACES = {"N": "0"}


def check(words: list[str]) -> None:
    """Raise where a program would not take a command."""
    match words:
        case [".", script] if script.endswith("/bin/activate"):
            return
        case ["make", *rest]:
            targets = [word for word in rest if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
            given = {word.partition("=")[0] for word in rest if "=" in word}
            for name in targets:
                assert name in ("bundle",) or any(re.search(rf"^{name}:", text, re.MULTILINE) for text in MAKEFILES), (
                    name
                )
            assert all(any(name in text for text in MAKEFILES) for name in given), given
        case ["python", "-m", module, *flags] if module in PARSERS:
            parse(module, flags)
        case ["torchrun", "...", *flags]:
            parse("fft/train.py", ["...", *flags])
        case ["torchrun", *rest]:
            asked = get_args_parser().parse_args([PLACES.get(word, word) for word in rest])
            parse(asked.training_script, asked.training_script_args)
        case ["deepspeed", ("-H" | "--num_gpus"), _, script, *flags]:
            parse(script, flags)
        case ["spark-submit" | "gcloud", *rest]:
            at = next(i for i, word in enumerate(rest) if word.endswith(".py") and "spark_jobs/" in word)
            flags = rest[at + 1 :]
            parse(rest[at][rest[at].index("spark_jobs/") :], flags[flags.index("--") + 1 :] if "--" in flags else flags)
        case [console, *flags] if console in SCRIPTS:
            parse({"fft-train": "fft/train.py"}.get(console, SCRIPTS[console].partition(":")[0]), flags)
        case _:
            raise AssertionError(f"nothing reads {words}: mark it with <!-- needs: ... -->")


def parse(name: str, flags: list[str]) -> None:
    """Read flags as a program does; of those that a page leaves out (...), nothing is asked. The trainer's settings
    are looked at, too."""
    if flags == ["--help"]:
        return
    left_out = "..." in flags
    flags = [word for word in flags if word != "..."]
    named = [flags[i + 1] for i, word in enumerate(flags[:-1]) if word == "--config"]
    try:
        if name in ("fft.train", "fft/train.py") and not left_out and all((ROOT / path).is_file() for path in named):
            parse_arguments(flags)
        else:
            PARSERS[name].parse_args(flags)
    except UserError as error:
        if not (left_out and "arguments are required" in str(error)):
            raise


COMMANDS = [(block, words) for page in PAGES for block in blocks(page) if not block.needs for words in block.commands]


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=[f"{block.page}:{block.line} {' '.join(words)[:60]}" for block, words in COMMANDS]
)
def test_a_program_takes_every_command(block: Block, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(words)


def test_commands_are_found():
    assert len(COMMANDS) > 60
    assert {block.page for block, _ in COMMANDS} >= {"README.md", "docs/training.md", "docs/first-fine-tune.md"}


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_are_flags(page):
    """Names with an underscore, which only our programs and DeepSpeed have."""
    known = {option for parser in PARSERS.values() for one in parser._actions for option in one.option_strings}
    known |= {option for one in get_args_parser()._actions for option in one.option_strings} | {"--num_gpus"}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {flag for flag in re.findall(r"(?<![\w-])--[a-z]+_\w+", text) if not flag.endswith("_")} - known == set()
