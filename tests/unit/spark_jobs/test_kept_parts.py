"""Finished parts outlive their job, are found by the same work alone, and never by a reader."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data import manifest as manifest_module
from fft.data.delta import commit_delta
from fft.data.manifest import Manifest, read_manifest
from fft.data.part_files import QUARANTINE, PartFile, RejectFile
from fft.data.table import Table
from fft.errors import UserError
from spark_jobs.token_table import output as output_module
from spark_jobs.token_table.kept import FINISHED, find_part, keep_part, waiting
from spark_jobs.token_table.output import Output


class Interrupted(Exception):
    """What ends a job here."""


def work_on(out: Path, work: str = "a", parts: int = 3, stop: int | None = None, **given) -> list[int]:
    """Make what is not there yet, and publish all; which parts were made. Stops before making the part ``stop``."""
    made = []
    output = Output(out, [""], [], given.get("overwrite", False), given.get("table_format", "parquet"))
    with output.claim({}, work) as writers:
        writer = writers[""]
        done = []
        for number in range(parts):
            part = find_part(writer.target, number)
            if part is None:
                if number == stop:
                    raise Interrupted
                made.append(number)
                with PartFile(writer.target, number) as sink, RejectFile(writer.target, number) as rejects:
                    ids = pa.array([[number] * (number + 1)], pa.list_(pa.int32()))
                    sink.write(pa.record_batch({"input_ids": ids}))
                    if number == 1:
                        rejects.add("a.jsonl", "no text", b"{}")
                    part = sink.finish({"seen": 1}, rejects.finish())
                keep_part(writer.target, part)
            done.append(part)
        writer.add(done)
        writer.finish(Manifest(writer.files, parts, writer.tokens))
    return made


def read(out: Path) -> list[int]:
    names = [file.path for file in read_manifest(out).files]
    return [row[0] for name in names for row in pq.read_table(out / name).column("input_ids").to_pylist()]


def lying(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_repeated_command_makes_only_what_is_missing(stop, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        work_on(out, stop=stop)
    assert waiting(out) == ({"a": stop} if stop else {})
    assert out.exists() == bool(stop)
    assert work_on(out) == list(range(stop, 3))
    assert read(out) == [0, 1, 2]
    names = {f"part-0000{i}.parquet" for i in range(3)} | {"_fft_manifest.json", f"{QUARANTINE}/part-00001.json"}
    assert lying(out) == names


def test_other_work_starts_anew(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        work_on(out, "a", stop=2)
    assert work_on(out, "b") == [0, 1, 2]
    assert not (out / FINISHED).exists()


def test_an_older_table_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    work_on(out, "old", parts=1)
    with pytest.raises(Interrupted):
        work_on(out, stop=2, overwrite=True)
    assert read(out) == [0]
    assert waiting(out) == {"a": 2}
    assert work_on(out, overwrite=True) == [2]
    assert read(out) == [0, 1, 2]
    assert not (out / FINISHED).exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_nothing_is_lost_of_what_was_being_published(old, table_format, tmp_path, monkeypatch):
    """Neither when the last step fails, nor when the driver is killed right before it."""
    out, given = tmp_path / "out", {"overwrite": True, "table_format": table_format}
    if old:
        work_on(out, "old", parts=2, **given)
    step, own = ("commit_delta", commit_delta) if table_format == "delta" else ("commit_all", output_module.commit_all)

    def killed(*_):
        shutil.copytree(out, tmp_path / "killed")
        raise UserError("no room")

    monkeypatch.setattr(output_module, step, killed)
    with pytest.raises(UserError, match="no room"):
        work_on(out, **given)
    monkeypatch.setattr(output_module, step, own)
    assert waiting(out) == {"a": 3}
    assert len(list(out.glob("part-*.parquet"))) == 2 * old
    (tmp_path / "killed" / "_fft_owner.json").unlink()  # this process lives on
    for place in (out, tmp_path / "killed"):
        assert work_on(place, **given) == []
        assert not (place / FINISHED).exists()
        assert [path.name for path in (place / QUARANTINE).iterdir()]
    if table_format == "parquet":
        assert read(out) == read(tmp_path / "killed") == [0, 1, 2]


def test_a_part_whose_file_is_gone_is_made_again(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        work_on(out, stop=2)
    next((out / FINISHED / "a").glob(".part-00001*.writing")).unlink()
    assert work_on(out) == [1, 2]
    assert read(out) == [0, 1, 2]


@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_the_list_of_very_many_files_comes_and_goes_with_its_table(table_format, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "INLINE", 2)
    out, given = tmp_path / "out", {"overwrite": True, "table_format": table_format}
    work_on(out, "a", **given)
    (first,) = out.glob("_fft_files-*")
    work_on(out, "b", parts=4, **given)
    table = Table.open(out)
    assert [table.read(group).input_ids[0] for group in range(4)] == [0, 1, 2, 3]
    lists = {path.name for path in out.glob("_fft_files-*")}
    assert lists == {table.manifest.beside[0]} | ({first.name} if table_format == "delta" else set())
    with pytest.raises(Interrupted):
        work_on(out, "c", parts=4, stop=2, **given)
    assert {path.name for path in out.glob("_fft_files-*")} == lists
    if table_format == "delta":
        assert len(Table.open(f"{out}@v0").manifest.files) == 3
