"""Parts of a table: seen by the driver as tasks left them, on the disk before they have a name, and no others."""

import errno
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.commits import commit_all
from fft.data.manifest import MANIFEST_NAME, FileInfo, Manifest
from fft.data.part_files import QUARANTINE, PartFile, PartFolder, RejectFile, publish_parts
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError

IDS = pa.record_batch({"input_ids": pa.array([[1], [2, 3]], pa.list_(pa.int32()))})


@pytest.fixture
def target(tmp_path):
    return PartFolder(tmp_path, WorkerNotes(str(tmp_path), "-job"))


def write(target, part=0, rejects=False):
    with PartFile(target, part) as sink, RejectFile(target, part) as aside:
        sink.write(IDS)
        if rejects:
            aside.add("a.jsonl", "no text", b"{}")
        return sink.finish({}, aside.finish())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_finished_parts_get_their_names_and_failed_tries_go(target, tmp_path):
    write(target, 1, rejects=True)  # of a task that failed afterwards, and ran again
    parts = [write(target, 1, rejects=True), write(target)]
    named = publish_parts(target, parts)
    assert [part.name for part in named] == ["part-00000.parquet", "part-00001.parquet"]
    assert names(tmp_path) == [f"{QUARANTINE}/part-00001.json", "part-00000.parquet", "part-00001.parquet"]
    assert pq.read_table(tmp_path / "part-00001.parquet").num_rows == 2


def test_a_job_leaves_what_is_not_its_own(target, tmp_path):
    other = PartFolder(tmp_path, WorkerNotes(str(tmp_path), "-other"), "-other")
    theirs = write(other, rejects=True)
    (tmp_path / "mine.txt").touch()
    publish_parts(target, [write(target)])
    assert (tmp_path / theirs.name).exists()
    assert (tmp_path / QUARANTINE / theirs.rejects).exists()
    publish_parts(other, [theirs])
    assert names(tmp_path) == [
        f"{QUARANTINE}/part-00000-other.json",
        "mine.txt",
        "part-00000-other.parquet",
        "part-00000.parquet",
    ]


def test_a_file_that_the_driver_does_not_see_is_named(target, tmp_path):
    """As where each machine has a disk of its own under the same path."""
    parts = [write(target), write(target, 1)]
    (tmp_path / parts[1].name).unlink()
    with pytest.raises(
        UserError, match=rf"{parts[1].name}, which a worker wrote, is not there for the driver: `output`"
    ):
        publish_parts(target, parts)
    assert parts[0].name in names(tmp_path)  # nothing has a name yet
    assert not list(tmp_path.glob("*.parquet"))


def test_a_file_that_the_driver_sees_in_part_is_named(target, tmp_path):
    part = write(target)
    os.truncate(tmp_path / part.name, part.bytes - 1)
    said = rf"{part.name}, which a worker wrote, has {part.bytes - 1} bytes, not {part.bytes}, for the driver"
    with pytest.raises(UserError, match=said):
        publish_parts(target, [part])


def test_what_was_set_aside_and_is_not_seen_is_named(target, tmp_path):
    part = write(target, rejects=True)
    (tmp_path / QUARANTINE / part.rejects).unlink()
    with pytest.raises(UserError, match=r"_quarantine/\.part-00000-job\..* is not there for the driver"):
        publish_parts(target, [part])


def test_all_is_on_the_disk_before_the_manifest_has_its_name(target, tmp_path, monkeypatch):
    """A power cut must not leave a manifest whose files, or whose files' names, have not arrived."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append(("folder" if is_folder else "file", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(source, final):
        done.append(("name", os.path.basename(final)))
        replace(source, final)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    part = write(target, rejects=True)
    assert done == [("file", part.rejects), ("file", part.name)]
    (named,) = publish_parts(target, [part])
    before = ["part-00000.parquet", "part-00000.json"]
    assert [event for event in done[2:] if event[0] == "name"] == [("name", name) for name in before]
    assert ("folder", tmp_path.name) in done[4:]
    assert ("folder", QUARANTINE) in done[4:]
    del done[:]
    (tmp_path / "other").mkdir()
    manifest = Manifest((FileInfo(named.name, 2, 3, named.bytes),), 2, 3)
    commit_all([(tmp_path, manifest), (tmp_path / "other", manifest)])
    kinds = [kind for kind, _ in done]
    assert kinds.index("name") < kinds.index("folder")
    assert kinds[: kinds.index("name")].count("file") >= 2  # both, so that the first has no name when the second fails
    assert done.count(("name", MANIFEST_NAME)) == 2


def test_a_full_disk_is_named_and_nothing_half_is_left(target, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fft.data.asking.sync", full)
    for rejects in (False, True):
        with pytest.raises(UserError, match=r"cannot be written to \(.*No space left on device\): make room there"):
            write(target, rejects=rejects)
        assert not list(tmp_path.rglob(".part-0*"))


def test_tables_that_are_published_together_all_fit_or_none_is(tmp_path, monkeypatch):
    manifest, folders = Manifest((), 0, 0), [tmp_path / "validation", tmp_path / "train"]
    for folder in folders:
        folder.mkdir()
    writes = []

    def full(path, text, **_):
        writes.append(path)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(text.encode())

    monkeypatch.setattr("fft.data.commits.write_file", full)
    with pytest.raises(OSError, match="No space"):
        commit_all([(folder, manifest) for folder in folders])
    assert names(tmp_path) == []


def test_a_folder_that_a_worker_does_not_see_is_no_lack_of_room(tmp_path):
    rows = pa.RecordBatch.from_pydict({"input_ids": pa.array([[1, 2]], pa.list_(pa.int32()))})
    sink = PartFile(PartFolder(tmp_path / "none", WorkerNotes(str(tmp_path))), 0)
    sink.write(rows)
    with pytest.raises(UserError, match=r"none cannot be written to .*: `output` must lie under this path on all mach"):
        sink.finish({})


@pytest.mark.parametrize("size", [1, 3, 40])
def test_row_groups_are_bounded_by_the_bytes_of_images(target, monkeypatch, size):
    monkeypatch.setattr("fft.data.part_files.ROW_GROUP_IMAGE_BYTES", 100)
    rows = pa.record_batch(
        {
            "input_ids": pa.array([[1]] * 40, pa.list_(pa.int32())),
            "image_grids": pa.array([[1, 2, 2] * (i % 3) for i in range(40)], pa.list_(pa.int32())),
            "images": pa.array([[b"x" * 30] * (i % 3) if i != 20 else [b"x" * 500] * 2 for i in range(40)]),
        }
    )
    with PartFile(target, 0) as sink:
        for first in range(0, 40, size):
            sink.write(rows.slice(first, size))
        part = sink.finish({})
    with pq.ParquetFile(target.parts / part.name) as file:
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    held = [sum(len(image) for row in group["images"].to_pylist() for image in row) for group in groups]
    assert pa.concat_tables(groups).equals(pa.Table.from_batches([rows]).cast(groups[0].schema))
    assert sorted(held)[-2:] == [90, 1000]  # one row that is larger is a group by itself
    assert [group.num_rows for group in groups][:3] == [4, 3, 3]
    assert part.tallies["vision images"] == sum(i % 3 for i in range(40))
