"""Files and folders appear whole or not at all, wherever a crash comes."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from fft import files
from fft.files import (
    atomic_file,
    end_of,
    recover_folder,
    replace_folder,
    staging_folder,
    start_folder,
    sync,
    write_atomically,
    write_file,
)


class Killed(BaseException):
    """Nothing handles it, as nothing handles a power cut."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert names(tmp_path) == ["a.json"]


def test_what_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, "old")
    with pytest.raises(FileExistsError), atomic_file(path) as aside:
        aside.write_text("half") and aside.mkdir()
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])


def test_the_file_and_then_its_name_reach_the_disk(tmp_path, monkeypatch):
    """In this order: a name without content would be worse than neither."""
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    write_atomically(tmp_path / "a", "x")
    assert re.fullmatch(r"\.a\.\w+\.writing", done[0])
    assert done[1:] == ["renamed", tmp_path.name]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(files.os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="not here"):
        sync(tmp_path / "a")


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    write = (
        "import sys; from pathlib import Path; from fft.files import write_atomically\n"
        "for _ in range(50): write_atomically(Path(sys.argv[1]), sys.argv[2] * 100_000)"
    )
    command = [sys.executable, "-c", write, str(tmp_path / "a")]
    writers = [subprocess.Popen([*command, letter]) for letter in "xy"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "a").exists():
            seen.add((tmp_path / "a").read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {"x" * 100_000, "y" * 100_000}
    assert names(tmp_path) == ["a"]


def make(folder, content):
    """A folder with a file and a subfolder with another."""
    staging = start_folder(folder)
    (staging / "below").mkdir()
    (staging / "below" / "b").write_text(content)
    (staging / "a").write_text(content)


def read(folder):
    contents = {(folder / "a").read_text(), (folder / "below" / "b").read_text()}
    (content,) = contents
    return content


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        make(tmp_path / "t", content)
        replace_folder(tmp_path / "t")
        assert (read(tmp_path / "t"), names(tmp_path)) == (content, ["t"])


def test_a_link_stays_and_its_end_is_replaced(tmp_path):
    make(tmp_path / "there" / "t", "old")
    replace_folder(tmp_path / "there" / "t")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "t")
    make(end_of(tmp_path / "link"), "new")
    replace_folder(end_of(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "there" / "t") == "new"
    assert names(tmp_path / "there") == ["t"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("old", [True, False])
def test_a_crash_at_any_point_loses_nothing(tmp_path, monkeypatch, number, when, old):
    """Before or after any call of a replacement: then the folder is there, or comes back, old or new but whole."""
    target = tmp_path / "t"
    if old:
        make(target, "old")
        replace_folder(target)
    make(target, "new")
    left = number
    with monkeypatch.context() as patch:

        def watched(call):
            def run(*args, **options):
                nonlocal left
                if left == 0 and when == "before":
                    raise Killed
                done = call(*args, **options)
                if left == 0:
                    raise Killed
                left -= 1
                return done

            return run

        patch.setattr(files.os, "replace", watched(os.replace))
        patch.setattr(files.os, "fsync", watched(os.fsync))
        patch.setattr(files.shutil, "rmtree", watched(files.shutil.rmtree))
        try:
            replace_folder(target)
            finished = True
        except Killed:
            finished = False
    recover_folder(target)
    recover_folder(target)  # as often as one likes
    if target.exists():
        assert read(target) == "new" or (read(target) == "old" and old and not finished)
    else:
        assert not old
    assert set(names(tmp_path)) <= {"t", ".t.writing"}
    make(target, "newest")
    replace_folder(target)
    assert (read(target), names(tmp_path)) == ("newest", ["t"])


def test_a_replacement_between_its_renames_is_finished(tmp_path):
    make(tmp_path / "t", "old")
    replace_folder(tmp_path / "t")
    make(tmp_path / "t", "new")
    (tmp_path / "t").rename(tmp_path / ".t.old")
    recover_folder(tmp_path / "t")
    assert (read(tmp_path / "t"), names(tmp_path)) == ("new", ["t"])


def test_without_the_new_folder_the_old_one_comes_back(tmp_path):
    make(tmp_path / "t", "old")
    replace_folder(tmp_path / "t")
    (tmp_path / "t").rename(tmp_path / ".t.old")
    recover_folder(tmp_path / "t")
    assert (read(tmp_path / "t"), names(tmp_path)) == ("old", ["t"])


def test_what_was_never_finished_is_cleared_by_the_next_writer(tmp_path):
    make(tmp_path / "t", "half")
    recover_folder(tmp_path / "t")  # that is another writer's to decide
    assert names(tmp_path) == [".t.writing"]
    assert names(start_folder(tmp_path / "t")) == []
    assert staging_folder(tmp_path / "t") == tmp_path / ".t.writing"


def test_the_current_directory_has_a_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert staging_folder(".") == tmp_path.with_name(f".{tmp_path.name}.writing")


def test_a_mount_that_cannot_rename_gets_the_file_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "replace", refuse)
    for content in ("one", "two"):
        write_atomically(tmp_path / "file", content)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", content)]


@pytest.mark.parametrize("write", [write_atomically, write_file])
@pytest.mark.parametrize("value", ['é "😀"', "half \udcff, é", {"\ud83d": [1]}])
def test_every_value_of_json_can_be_written(value, write, tmp_path):
    write(tmp_path / "file", json.dumps(value, ensure_ascii=False))
    assert json.loads((tmp_path / "file").read_text("utf-8")) == value
    assert ("é" in (tmp_path / "file").read_text("utf-8")) == ("é" in str(value))  # as it is read, where that can be
