"""Pages, and what notebooks show, fit into windows of a desk and of a phone, however long names are."""

from dataclasses import replace

import numpy as np
import pytest
from browser import CHROMIUM, browser
from device.token_tables import write_table
from spark.chat_templates import save_chat_tokenizer
from test_report import write_run
from transformers import AutoTokenizer

from fft.data.manifest import FileInfo, Manifest, Manifests
from fft.data.table import Table
from fft.plan import find_layouts
from fft.report import report_on
from fft.spark.cluster import Result
from fft.text.shown import documents_of_row, load_decoder
from fft.text.shown_page import as_page
from fft.training.metric_sinks import METRICS, JsonLines, by_dataset_in, read_numbers

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

LONG = "a-name-that-nobody-should-give-" + "x" * 90
RTL = "هذا نص عربي طويل من اليمين إلى اليسار "
#: What a notebook wraps an output in: no wider than its cell, and styles of its own for what is in it.
CELL = (
    '<!doctype html><meta name="viewport" content="width=device-width"><style>td, th {{ padding: .5em; text-align: '
    "right }} pre {{ font-family: sans-serif; white-space: pre-wrap; word-break: break-all }}</style><main>{}</main>"
)
BEYOND = """[...document.querySelectorAll('body *')].filter(one => {
    if (one.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let at = one; at; at = at.parentElement) if (getComputedStyle(at).overflowX === 'auto') return false;
    return true;
}).map(one => one.outerHTML.slice(0, 200))"""


def run_report(folder):
    """Of two runs with twelve tables of three datasets, and one of twenty."""
    runs = []
    for name in ("one", f"two-{LONG}"):
        runs.append(write_run(folder / name / "run", 60))
        numbers = {}
        for table in range(12):
            title = f"{LONG[:80]}-{table}" if table % 2 else f"table-{table}"
            numbers[f"eval/{title}/loss"] = 3.0
            for dataset in range(20 if not table else 3):
                numbers[f"eval/{title}/loss/{LONG}{dataset}"] = 2.0 + dataset
        sink = JsonLines(runs[-1] / METRICS)
        for step in (20, 40, 60):
            sink.write(step, {key: value - step / 100 for key, value in numbers.items()})
    assert [len(own) for own in by_dataset_in(read_numbers(runs[0])[0]).values()] == [20, *[3] * 11]
    return report_on(*runs)


def manifests():
    datasets = {f"{LONG}{at}": {"rows": at, "tokens": 10**at} for at in range(18)}
    counts = {"lengths": {str(1 << at): at + 1 for at in range(18)}, "datasets": datasets}
    made = Manifest((FileInfo("p", 2, 10**17, 9),), 2, 10**17, lineage={"job": "shuffle", "counts": counts})
    return Manifests(train=made, validation=replace(made, rows=1))


def shown_row(folder, ids):
    tokenizer = save_chat_tokenizer(folder / "tokenizer", "qwen2.5")
    encoded = AutoTokenizer.from_pretrained(tokenizer).encode(f"{RTL * 9}\n{'w' * 600}\n\tx https://a.b/{'path/' * 90}")
    labels = [np.where(np.arange(len(encoded)) % 9 < 5, -100, encoded).tolist()]
    table = Table.open(write_table(folder / "t", [np.array(encoded, np.int32)], 1, labels=labels))
    decoder = load_decoder(table, str(tokenizer))
    return as_page(f"/{LONG * 2}", documents_of_row(table, 0), decoder, ids=ids, summary=f"{LONG}: 1 row")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, report = tmp_path_factory.mktemp("pages"), run_report(tmp_path_factory.mktemp("runs"))
    records = [{"step": step, "loss": 5 - step / 60, "eval_loss": 5 - step / 50} for step in range(1, 200)]
    found = find_layouts(
        "conf/models/llama-3m.json", "conf/hardware/8xa100-40g-pcie.yaml", ranks=8, seq_len=512, tokens_per_step=1 << 15
    )
    shown = [manifests(), report, Result(f"runs/{LONG}", f"s3://bucket/{LONG}/{LONG}", records), found]
    pictures = [manifests().plot(), report.plot(), shown[2].plot(), found.plot()]
    made = {f"output-{at}": CELL.format(one._repr_html_()) for at, one in enumerate([*shown, *pictures])}
    made |= {"report": report.page, "row": shown_row(folder / "a", False), "ids": shown_row(folder / "b", True)}
    for name, page in made.items():
        (folder / f"{name}.html").write_text(page)
    return [folder / f"{name}.html" for name in made]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_overflows(pages, width):
    with browser() as window:
        for page in pages:
            window.open(page.as_uri(), width)
            assert window.run("document.documentElement.scrollWidth <= innerWidth"), page.stem
            assert window.run(BEYOND) == [], page.stem
            inner = "[...document.querySelectorAll('iframe')].map(one => one.contentDocument.documentElement)"
            assert window.run(f"{inner}.every(one => one.scrollWidth <= one.clientWidth)"), page.stem
            # Words of pictures are not smaller than what can be read.
            assert window.run(
                "[...document.querySelectorAll('img')].every(one => one.width >= Math.min(400, one.naturalWidth))"
            )
        assert window.told == []


def test_columns_of_layouts_stay_columns(pages):
    """A notebook's own styles for what is in a cell would break them."""
    with browser() as window:
        window.open(next(page for page in pages if page.stem == "output-3").as_uri(), 400)
        style = "getComputedStyle(document.querySelector('pre'))"
        assert window.run(f"[{style}.whiteSpace, {style}.fontFamily, {style}.wordBreak]") == [
            "pre",
            "monospace",
            "normal",
        ]
