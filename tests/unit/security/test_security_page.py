"""The page of what is trusted names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_page_names_tests_that_are_there():
    named = set(re.findall(r"`([\w/]*test_\w+\.py)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    here = ROOT / "tests" / "unit" / "security"
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file() and not (here / name).is_file()] == []
