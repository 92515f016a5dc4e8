"""The page about a run: what it says is what the run's folder says, and a browser shows it."""

import itertools
import json
import math
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from browser import CHROMIUM, browser
from hypothesis import example, given
from hypothesis import strategies as st

from fft.chart import Line, chart, means, thinned, ticks
from fft.checkpoint.folder import STATE, TRAINING, to_json
from fft.errors import UserError
from fft.report.__main__ import main
from fft.report.page import page_of
from fft.report.run import read_run
from fft.train_arguments import TrainArguments
from fft.training.metric_sinks import METRICS, JsonLines

VALUES = st.floats(-1e9, 1e9, allow_nan=False)
SMALL = {
    **{"model_type": "llama", "vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}


def write_run(folder, steps=300, **changed):
    """What the trainer leaves: its own sink writes the numbers."""
    checkpoint = folder / "step-100"
    (checkpoint / TRAINING).mkdir(parents=True)
    config = checkpoint / "config.json"
    config.write_text(json.dumps(SMALL))
    (checkpoint / STATE).write_text(to_json({"step": 100, "eval_loss": 5.0}))
    sink = JsonLines(folder / METRICS)
    sink.write(0, {"pipeline_bubble": 0.125})
    for step in range(1, steps + 1):
        numbers = {"loss": 5 * math.exp(-step / 90) + 1, "grad_norm": 1.5, "tokens_per_second": 4800.0, "mfu": 0.41}
        sink.write(step, numbers | {"lr": 1e-4, "memory": 2.0**31, "seconds": 1.5 * step, "data_wait": 0.01})
        if step % 100 == 0:
            sink.write(step, {"eval_loss": 6 - step / 100})
    args = TrainArguments(model=str(config), init=True, train_data="tables/books", pipe_parallel_size=2, **changed)
    (folder / "arguments.yaml").write_text(yaml.safe_dump(asdict(args)))
    data = {"train_data": {"table": "tables/books", "fingerprint": "f98757c9"}, "eval_data": None}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    facts = {"command": "fft.train --seed <5>", "torch": "2.13.0", "ranks": {0: "a cpu", 1: "b cpu"}}
    (folder / "environment.yaml").write_text(yaml.safe_dump(facts))
    return folder


class Text(HTMLParser):
    """The words of a page, cell by cell; what it would load from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.words, self.loaded = [], []
        self.feed(page)

    def handle_data(self, data):
        if data.strip():
            self.words.append(" ".join(data.split()))

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href")]


def test_a_page_says_what_the_folder_says(tmp_path):
    run = read_run(write_run(tmp_path / "books", seq_len=1024))
    words = Text(page_of([run])).words
    pairs = dict(reversed(list(itertools.pairwise(words))))  # what follows a word first
    assert pairs["steps"] == "300"
    assert pairs["loss"] == f"{5 * math.exp(-300 / 90) + 1:.4f}"
    assert pairs["best evaluation"] == "3.0000"
    assert pairs["MFU"] == "41.0 %"
    assert pairs["memory of a rank"] == "2 GiB"
    assert pairs["time"] == "0:07:30"
    assert pairs["seq_len"] == "1024"
    assert "seed" not in pairs  # is the default
    assert pairs["command"] == "fft.train --seed <5>"  # as text, not as a tag
    assert any("llama, 0.04 M parameters" in word and "pipe 2" in word for word in words)  # the plan of two ranks


def test_what_cannot_be_read_is_told(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    with open(folder / METRICS, "a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "loss": NaN}\n{"step": 2, "loss": 9.5}\nnonsense\n{"step": 4, "lo')
    run = read_run(folder)
    assert run.unread == 2
    assert dict(run.points("loss"))[2] == 9.5  # taken again after a crash
    assert 3 not in dict(run.points("loss"))
    assert "Lines of numbers that could not be read" in Text(page_of([run])).words
    shutil.rmtree(folder / "step-100")
    assert read_run(folder).planned == "known with the first checkpoint"


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="is no run: it has no"):
        main([str(tmp_path)])
    run = write_run(tmp_path / "run", steps=2)
    assert main([str(run)]) == 0
    with pytest.raises(UserError, match=r"run\.html exists: give --overwrite"):
        main([str(run)])
    assert main([str(run), "--overwrite"]) == 0
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        main([str(run), "-o", str(tmp_path / "nowhere" / "run.html")])
    (run / "data.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"data\.yaml holds no settings"):
        main([str(run), "-o", str(tmp_path / "other.html")])
    with pytest.raises(UserError, match="7 runs are too many"):
        main([str(run)] * 7)


def test_ranks_and_who_of_them_was_behind(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    sink = JsonLines(folder / METRICS)
    for step, behind in ((10, {}), (20, {"rank_behind": 1, "rank_behind_times": 3.0})):
        sink.write(step, {"rank_work": [0.5, 1.5 if behind else 0.5], "rank_wait": [1.5, 0.25]} | behind)
    run = read_run(folder)
    assert run.unread == 0
    assert run.points("rank_work/1") == [(10, 0.5), (20, 1.5)]
    page = page_of([run])
    assert "Ranks, seconds a step" in Text(page).words
    table = page.partition("Ranks, seconds a step")[2].partition("</table>")[0]
    rows = [row.split("</td>") for row in table.split("<tr>") if row.startswith("<td>run</td>")]
    cells = [[cell.removeprefix("<td>") for cell in row[:6]] for row in rows]
    assert cells == [["run", "0", "0.5", "1.5", "", ""], ["run", "1", "1", "0.25", "1", "up to step 20"]]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_two_runs_without_a_network(tmp_path):
    runs = [write_run(tmp_path / name, steps) for name, steps in (("a", 300), ("b", 150))]
    page = tmp_path / "both.html"
    assert main([*map(str, runs), "-o", str(page)]) == 0
    assert page.stat().st_size < 2 << 20
    assert Text(page.read_text()).loaded == []
    with browser() as shown:
        shown.open(page.as_uri())
        assert shown.run("document.querySelectorAll('svg').length") >= 7
        assert shown.run("[...document.querySelectorAll('polyline')].every(x => x.getBBox().width > 0)")
        assert shown.run("document.documentElement.scrollWidth <= innerWidth")
        assert shown.told == []


@given(VALUES, VALUES, st.integers(1, 8))
def test_ticks_are_round_numbers_within(low, high, count):
    low, high = min(low, high), max(low, high)
    found = ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert all(low - slack <= value <= high + slack for value in found)
    assert found == sorted(found)
    assert len(found) <= 2 * count + 1


@given(st.lists(VALUES, min_size=1, max_size=300), st.integers(4, 40))
@example([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0], 5)
def test_thinned_lines_keep_their_extremes(values, most):
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thinned(points, most)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert len(kept) <= max(most, 2)
    assert {min(values), max(values)} <= {value for _, value in kept}
    assert sum(len(values[i : i + 7]) for i in range(0, len(values), 7)) == len(values)
    middle = means(points, 7)
    assert len(middle) == -(-len(values) // 7)
    assert middle[0][1] == pytest.approx(sum(values[:7]) / len(values[:7]), rel=1e-6, abs=1e-3)


@given(st.lists(st.lists(VALUES, max_size=30), max_size=3), st.text(max_size=5))
@example([[0.0, 5e-324]], "")
def test_any_numbers_make_a_picture(lines, label):
    label = "".join(letter for letter in label if letter.isprintable())
    drawn = chart("Loss", [Line(label, list(enumerate(values))) for values in lines], lambda value: f"{value:.3g}")
    assert bool(drawn) == any(lines)
    for element in ElementTree.fromstring(drawn).iter("polyline") if drawn else ():
        for point in element.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 520
            assert 0 <= y <= 240


def test_a_spike_hides_no_curve():
    values = [(float(step), 1 + step % 5 / 10) for step in range(100)]
    drawn = chart("Norm", [Line("run", [*values, (100.0, 1e9)])], lambda value: f"{value:.3g}")
    labels = [text.text for text in ElementTree.fromstring(drawn).iter("text") if text.get("text-anchor") == "end"]
    assert max(map(float, labels)) < 5


def test_a_copied_folder_is_the_same_run(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    shutil.copytree(run, tmp_path / "copy" / "run")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(SMALL))
    assert page_of([read_run(run)]) == page_of([read_run(tmp_path / "copy" / "run")])
