"""Commands as they stand in the Markdown pages.

A block of a page is fenced, or indented by four. Its commands are the lines that begin with a program's name; what
goes on behind a backslash is joined, comments are left out. A line ``<!-- needs: WHAT -->`` before a block says that
nothing here has what its commands need, ``<!-- run by: FILE, FILE -->`` that these tests run them.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from conftest import ROOT

#: All pages that tell somebody what to type.
PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)
_MARK = re.compile(r"<!-- (needs|run by): (.+) -->")
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S* +)*(?:(?:python3?|spark-submit|deepspeed|torchrun|curl|\.) +(?:-|\.\.\. |\S*[/:])"
    r"|make +[-\w]|[\w./]+\.sh\b"
    r"|(?:pip|databricks|gcloud|kubectl|sbatch|srun|docker|git|tensorboard|vllm|apt-get|fft-[a-z-]+) +\w)"
)
_UNMARKED: tuple[str, tuple[str, ...]] = ("", ())


@dataclass(frozen=True)
class Block:
    """A block of a page: where it begins, the word behind its fence, its text; what it needs, or who runs it."""

    page: str
    line: int
    language: str
    text: str
    needs: str = ""
    run_by: tuple[str, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """Its commands as words, those that are joined by ``&&`` or ``|`` apart."""
        typed = [line for line in self.lines if COMMAND.match(line)]
        return [words for line in typed for words in _apart(shlex.split(line, comments=True))]

    @property
    def lines(self) -> list[str]:
        """What may be typed of it, line by line."""
        whole = self.text.replace("\\\n", " ").splitlines() if self.language in ("", "bash", "sh") else []
        return [line.strip() for line in whole if line.strip()]


def blocks(page: str) -> Iterator[Block]:
    """All blocks of a page, from top to bottom."""
    fence, mark, begun, language = "", _UNMARKED, 0, ""
    kept: list[str] = []
    for number, line in enumerate([*(ROOT / page).read_text(encoding="utf-8").splitlines(), "."], start=1):
        if fence:
            if line.strip() == fence:
                yield Block(page, begun, language, "\n".join(kept), *mark)
                fence, mark, kept = "", _UNMARKED, []
            else:
                kept.append(line)
        elif line.startswith("    ") or (kept and not line.strip()):
            begun = begun if kept else number
            kept.append(line.removeprefix("    "))
        else:
            if kept:
                yield Block(page, begun, "", "\n".join(kept), *mark)
                mark, kept = _UNMARKED, []
            if opened := re.match(r" *(```+)(\w*)", line):
                fence, language, begun = opened[1], opened[2], number
            elif found := _MARK.fullmatch(line.strip()):
                mark = (found[2], ()) if found[1] == "needs" else ("", tuple(found[2].split(", ")))
            elif line.strip():
                mark = _UNMARKED


def _apart(words: list[str]) -> Iterator[list[str]]:
    """Commands of a line, without the variables that stand before them."""
    command: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|"):
            yield command
            command = []
        elif command or not re.match(r"[A-Z_]+=", word):
            command.append(word)
