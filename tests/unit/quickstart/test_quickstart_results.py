import json
from pathlib import Path

import pytest

from fft.quickstart.results import plot_losses, read_metrics, summary


@pytest.fixture
def losses(tmp_path):
    records = [{"step": 0, "eval_loss": 8.0, "eval_tokens": 10}]
    for step in range(1, 31):
        record = {"step": step, "loss": 8.0 - step / 10, "lr": 1e-3, "grad_norm": 1.0}
        if step in (10, 30):
            # 10 steps at 100 tokens/s and 20 at 400 take as long as 30 at 200.
            record |= {"tokens_per_second": 100.0 if step == 10 else 400.0, "seconds": 1.0, "data_wait": 0.0}
        records.append(record)
    records.append({"step": 30, "eval_loss": 5.25, "eval_tokens": 10})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return read_metrics(tmp_path / "metrics.jsonl")


def test_metrics(losses):
    assert losses.train[0] == (1, 7.9)
    assert losses.validation == [(0, 8.0), (30, 5.25)]
    assert losses.tokens_per_second == pytest.approx(200.0)
    assert losses.last_train == pytest.approx(5.0 + 0.45)


def test_picture_is_a_png(losses, tmp_path):
    plot_losses(losses, 6.5, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_summary_says_what_matters(losses):
    page = summary(
        {"train": 9_000_000, "validation": 200_000},
        [("corpus", 0.5, "2 documents"), ("train", 10.25, "200 tokens/s")],
        losses,
        6.5,
        [("def f(", "self):\n    return 1")],
        {"model": Path("runs/model"), "picture": Path("runs/loss.png")},
    )
    lines = page.splitlines()
    assert "train               10.2  200 tokens/s" in lines
    assert "  train           9,000,000" in lines
    assert "  validation       8.000   5.250" in lines
    assert "  unigram model            6.500   beaten by 1.250" in lines
    assert "  | def f(|self):" in lines
    assert "  |     return 1" in lines
    assert lines[-2:] == ["model: runs/model", "picture: runs/loss.png"]
