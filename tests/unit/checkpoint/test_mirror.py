"""Checkpoints of a disk in a store, behind the training: the same files, however the store fails meanwhile."""

import time

import pytest
from pyarrow import fs
from store_proxy import EXPIRED, proxied
from test_stored_run import files, write

from fft.checkpoint import mirror
from fft.checkpoint.mirror import Mirror
from fft.checkpoint.run import LocalRun
from fft.checkpoint.stored_run import StoredRun
from fft.data.views import files_below


@pytest.fixture
def proxy(store, store_environment, monkeypatch):
    with proxied(store_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(mirror, "_PERIOD", 0.02)
        monkeypatch.setattr(mirror, "_FIRST_WAIT", 0.05)
        yield proxy


@pytest.fixture
def runs(proxy, tmp_path):
    run = LocalRun(tmp_path / "run")
    return run, StoredRun(f"s3://lake/{tmp_path.name}", run.notes)


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_to_be_kept_is_sent_whole(runs, store, tmp_path):
    run, stored = runs
    write(run, 1, loss=1.0)
    mirrored = Mirror(*runs, 1, 1, print)
    wait_until(lambda: stored.steps() == [1])
    for step, loss in ((2, 5.0), (3, 4.0)):
        write(run, step, loss)
    run.put("metrics.jsonl", "{}\n")
    mirrored.close()
    assert stored.steps() == [1, 3]
    assert [stored.tag_of(name) for name in ("latest", "best")] == ["step-3", "step-1"]
    assert stored.text("metrics.jsonl") == "{}\n"
    fs.copy_files(f"{stored.storage.root}/step-3", str(tmp_path / "fetched"), store, fs.LocalFileSystem())
    assert files(tmp_path / "fetched") == files(run.path / "step-3")


def test_a_store_that_fails_is_told_and_asked_again(runs, proxy):
    run, stored = runs
    said: list[str] = []
    proxy.rule = lambda method, path: EXPIRED if method != "HEAD" and proxy.refused < 5 else None
    mirrored = Mirror(*runs, 0, 0, said.append)
    write(run, 1)
    wait_until(lambda: proxy.refused == 5)
    mirrored.close()
    assert stored.steps() == [1]
    assert "ExpiredToken" in said[0]
    assert said[0].startswith("warning: --upload: ")
    assert said[0].endswith("again in 0 s, training goes on")


def test_the_end_does_not_wait_for_ever(runs, proxy, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(mirror, "PATIENCE", 0.5)
    write(runs[0], 1)
    proxy.rule = lambda method, path: EXPIRED
    Mirror(*runs, 0, 0, said.append).close()
    assert said[-1].startswith(f"warning: {runs[1].name} does not have all of {runs[0].name} yet: the same command")
    proxy.rule = lambda method, path: None


def test_one_that_goes_while_it_is_sent(runs, proxy):
    run, stored = runs
    proxy.rule = lambda method, path: 0.3 if method == "PUT" and "/step-1/" in path else None
    mirrored = Mirror(*runs, 1, 0, print)
    write(run, 1)
    wait_until(lambda: any("/step-1/" in path for _, path in proxy.asked))
    write(run, 2)
    run.remove("step-1")
    mirrored.close()
    assert stored.steps() == [2]
    assert not [name for name in files_below(stored.storage) if name.startswith("step-1/")]
