"""docs/flags.md is what the commands' parsers say."""

import runpy

from conftest import ROOT


def test_the_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "flags.py"))["page"]()
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page, "make docs"
