"""Put all that the site is made of below one folder, each file where its links are right: ``make site``.

Pages link to one another, to settings and to examples, from their places in the repository. MkDocs knows one folder.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"


def main() -> None:
    """Copy pages, and what they link to."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for folder in ("docs", "examples", "conf", "notebooks"):
        shutil.copytree(ROOT / folder, PAGES / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for page in ROOT.glob("*.md"):
        shutil.copy2(page, PAGES)


if __name__ == "__main__":
    main()
