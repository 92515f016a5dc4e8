"""Wild cards of URLs find what a shell's would."""

import glob
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from fft.corpus.urls import Unreached, expand_url

NAMES = ("a", "ab", "b c", "_h", ".h", "%41", "a#b")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for above, below in itertools.product(NAMES, NAMES):
        (root / above / below).mkdir(parents=True)
        (root / above / f"{below}.x").touch()
        (root / above / below / "y.x").touch()
    return root


PIECE = st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]", "[a-b]", " ", "%41", ".x", "#", "_"])
PATTERNS = st.lists(st.lists(PIECE, min_size=1, max_size=3).map("".join), min_size=1, max_size=3).map("/".join)


@settings(max_examples=300, deadline=None)
@given(pattern=PATTERNS)
def test_wild_cards_match_what_a_shell_matches(tree, pattern):
    _, places = expand_url(f"file://{tree}/{pattern}")
    found = [place.root for place, info in places if info.type != fs.FileType.NotFound]
    wild = [bool(re.search(r"[*?\[]", part)) for part in pattern.split("/")]
    expected = [
        path
        for path in glob.glob(f"{tree}/{pattern}")
        if not any(  # as Spark does, what begins with _ is passed over, unless it is named
            asked and part.startswith("_") for asked, part in zip(wild, path[len(f"{tree}/") :].split("/"), strict=True)
        )
    ]
    assert sorted(found) == sorted(expected)
    assert all(place.name == f"file://{place.root}" for place, _ in places)


def test_braces_are_alternatives_also_within_each_other(tree):
    _, places = expand_url(f"file://{tree}/{{a,b c}}/{{a,{{ab,%41}}}}.x")
    assert [place.root.removeprefix(f"{tree}/") for place, _ in places] == [
        f"{above}/{below}.x" for above in ("a", "b c") for below in ("%41", "a", "ab")
    ]


def test_what_does_not_answer_is_unreached():
    for url in ("nosuch://host/a", "nosuch://host/*.x", "dbfs:/a/*"):
        with pytest.raises(Unreached):
            expand_url(url)
