"""Lengths of documents, and the picture of a table."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from browser import CHROMIUM, browser
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.data.image_tallies import image_facts, tally_images
from fft.data.lengths import document_lengths, histogram_of, tally_lengths
from fft.data.manifest import FileInfo, Manifest
from fft.errors import UserError
from spark_jobs.cli import run_shuffle
from spark_jobs.token_table.picture import _charts, _figure, check_report, write_report

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=6)


@settings(deadline=None)
@given(ROWS)
def test_lengths_of_packed_rows(rows):
    table = pa.table(
        {
            "input_ids": pa.array([[0] * sum(row) for row in rows], pa.list_(pa.int32())),
            "cu_seqlens": pa.array([np.cumsum([0, *row]).tolist() for row in rows], pa.list_(pa.int32())),
        }
    )
    lengths = document_lengths(table) if rows else np.empty(0, int)
    assert lengths.tolist() == [n for row in rows for n in row]
    assert document_lengths(table.select(["input_ids"])).tolist() == [sum(row) for row in rows]


def test_bins_begin_at_powers_of_two():
    tallies = tally_lengths(np.array([1, 2, 3, 4, 1023, 1024, 1025, 0]))
    assert histogram_of({**tallies, "other": 5}) == {"1": 1, "2": 2, "4": 1, "512": 1, "1024": 2}
    assert histogram_of(tally_lengths(np.array([2**31 - 1, 2**31]))) == {str(2**30): 1, str(2**31): 1}


@pytest.fixture
def manifest():
    counts = {
        "unused": 24,
        "lengths": {"8": 3, "16": 1},
        "datasets": {"a <b>": {"rows": 3, "tokens": 60}, "c": {"rows": 1, "tokens": 40}},
    }
    lineage = {"job": "repartition", "inputs": ["x"], "parameters": {"seed": 1}, "counts": counts}
    lineage["timing"] = {"tokens_per_second": 7, "seconds": 1.0}
    return Manifest((FileInfo("p.parquet", 4, 100, 9),), 4, 100, None, 31, 1, lineage)


def test_a_page_holds_pictures_and_facts(manifest, tmp_path):
    write_report({"train": manifest, "validation": manifest}, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 6
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    for name in ("train", "validation"):
        assert f"<h2>{name}</h2>" in page
    for row in (
        ("job", "repartition"),
        ("inputs", "x"),
        ("seed", "1"),
        ("unused", "24"),
        ("tokens/s", "7"),
        ("c", "1", "25.0%", "40", "40.0%"),
    ):
        assert page.count(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_picture(manifest, tmp_path):
    write_report(manifest, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_that_cannot_be_written_is_refused_before_the_job(tmp_path):
    with pytest.raises(UserError, match=r"`report` .*r\.pdf must end in \.html or \.png"):
        check_report(tmp_path / "r.pdf", False)
    with pytest.raises(UserError, match="there is no folder"):
        run_shuffle(["-i", "none", "-o", "out", "--report", str(tmp_path / "none" / "r.png")])
    (tmp_path / "r.png").touch()
    with pytest.raises(UserError, match="exists: allow that with `overwrite=True`"):
        check_report(tmp_path / "r.png", False)
    check_report(tmp_path / "r.png", True)


def test_images_are_drawn_and_counted(manifest, tmp_path):
    rows = pa.table(
        {
            "images": pa.array([[b"abc", b"d"], [], [b"e"]], pa.list_(pa.binary())),
            "image_grids": pa.array([[1, 4, 6, 3, 2, 2], [], [1, 2, 2]], pa.list_(pa.int32())),
        }
    )
    facts = image_facts(tally_images(rows), 2)
    assert facts == {
        "images": 3,
        "rows_with_images": 2,
        "image_bytes": 5,
        "patches": 40,
        "patches_squared": 24**2 + 3 * 4**2 + 4**2,
        "image_tokens": 10,
        "images_per_row": {"0": 1, "1": 1, "2": 1},
        "patches_per_row": {"0": 1, "4": 1, "32": 1},
    }
    assert not tally_images(rows.drop_columns(["images"]))
    lineage = {**manifest.lineage, "counts": {**manifest.lineage["counts"], "vision": facts}}
    write_report(replace(manifest, vision={"merge": 2}, lineage=lineage), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<td>patches_squared</td><td>640</td>" in page
    assert "patches of a row, at least" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_does_not_overflow(manifest, tmp_path):
    datasets = {f"/data/a-dataset-with-a-very-long-name-{'x' * 90}-{i}": {"rows": 1, "tokens": i} for i in range(40)}
    counts = manifest.lineage["counts"] | {"datasets": datasets, "trained_tokens": 25}
    lineage = manifest.lineage | {"counts": counts, "inputs": ["/" + "y" * 300]}
    write_report(replace(manifest, lineage=lineage), tmp_path / "r.html")
    with browser() as page:
        for width in (1280, 400):
            page.open((tmp_path / "r.html").as_uri(), width)
            assert page.run("document.documentElement.scrollWidth") <= width
            widths = page.run("[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().width)")
            assert min(widths) > 300
            lines = page.run(
                "[...document.querySelectorAll('.shares td:nth-child(n+2)')].map(one => {"
                "const range = document.createRange(); range.selectNodeContents(one);"
                "return range.getClientRects().length})"
            )
            assert set(lines) == {1}  # no number is broken
        assert not page.told
    figure = _figure([_charts("", replace(manifest, lineage=lineage))])
    assert figure.axes[1].get_title() == "100 tokens, 25.0% trained on"
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()][-1] == "29 others"


def test_ticks_are_whole_and_bars_of_one_name_are_two(manifest):
    datasets = {"a/train": {"rows": 1, "tokens": 2}, "b/train": {"rows": 1, "tokens": 1}}
    small = replace(manifest, lineage=manifest.lineage | {"counts": {"datasets": datasets, "lengths": {"1": 2}}})
    figure = _figure([_charts("", small)])
    figure.canvas.draw()
    lengths, mixture, packing = figure.axes
    for axis in (lengths.yaxis, mixture.xaxis, packing.xaxis):
        assert all(float(tick).is_integer() for tick in axis.get_ticklocs())
    assert [bar.get_width() for bar in mixture.patches] == [2, 1]
    thick = mixture.patches[0].get_window_extent().height
    assert thick < 0.15 * mixture.get_window_extent().height  # two bars are no walls
    box, own = packing.get_legend().get_window_extent(), packing.get_window_extent()
    assert box.y1 <= own.y0
