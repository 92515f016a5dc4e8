"""The pages: links lead somewhere, everything is two clicks away, what they quote of the code stands in it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md")
)
START = "docs/index.md"
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@cache
def prose(page: str) -> str:
    """A page without its blocks of code and code within lines."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(page: str) -> set[str]:
    """What its headings are called in links, as GitHub and MkDocs do."""
    titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def links(page: str) -> Iterator[tuple[Path, str]]:
    """Files that a page links to, and where in them."""
    for target in _LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = unquote(target).partition("#")
            yield ((ROOT / page).parent / path).resolve() if path else ROOT / page, anchor


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.is_file(), f"{page} links to {path}"
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), f"{page} links to {path}#{anchor}"


def test_no_page_is_more_than_two_clicks_away():
    near = {START}
    for _ in range(2):
        near |= {path.relative_to(ROOT).as_posix() for page in near if page.endswith(".md") for path, _ in links(page)}
    assert set(PAGES) - near == set()


def test_the_site_has_every_page_in_its_navigation():
    def pages(entries) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                if isinstance(value, str):
                    yield value
                else:
                    yield from pages(value)

    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == set(PAGES)
    assert named[0] == START


def sentences() -> str:
    """All texts of the code, ``...`` for what is put into them."""
    found = []
    for path in (path for package in ("fft", "spark_jobs") for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(one.value) if isinstance(one, ast.Constant) else "..." for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_what_the_code_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for text in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) if len(text.split()) > 4]
    said = sentences()
    assert len(quoted) > 30
    assert [text for text in quoted if text not in said] == []
