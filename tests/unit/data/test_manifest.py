"""The manifest: read back as written, whole or not at all, and the hash that ties a table to its tokenizer."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fft.data import manifest as module
from fft.data.commits import begin_writing, commit
from fft.data.file_list import pack_list
from fft.data.manifest import (
    MANIFEST_NAME,
    WRITING_NAME,
    FileInfo,
    Manifest,
    TokenizerInfo,
    read_manifest,
    tokenizer_sha256,
)
from fft.errors import UserError

FACTS = Manifest((FileInfo("part-0.parquet", 2, 7, 99),), 2, 7)

numbers = st.integers(0, 2**53)
names = st.text(max_size=8)
manifests = st.builds(
    Manifest,
    files=st.lists(st.builds(FileInfo, names, numbers, numbers, numbers), max_size=3).map(tuple),
    rows=numbers,
    tokens=numbers,
    tokenizer=st.none() | st.builds(TokenizerInfo, names, names, numbers, st.none() | numbers),
    seq_len=st.none() | numbers,
    seed=st.none() | numbers,
    lineage=st.dictionaries(names, names | numbers | st.none() | st.lists(names), max_size=3),
)


@given(manifests)
def test_what_is_written_is_read(manifest):
    text = manifest.to_json()
    assert Manifest.from_json(text, "here") == manifest
    assert Manifest.from_json(text, "here").to_json() == text


def test_equal_facts_have_equal_bytes():
    ours, theirs = ({"b": 1, "a": 2}, {"a": 2, "b": 1})
    assert Manifest((), 0, 0, lineage=ours).to_json() == Manifest((), 0, 0, lineage=theirs).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format_version": "1"}',
        '{"format_version": 1, "files": [{"path": "p"}], "rows": 1, "tokens": 1}',
        '{"format_version": 1, "files": [], "rows": 1}',
        '{"format_version": 1, "files": [], "rows": 1, "tokens": 1, "unheard": 1}',
        '{"format_version": 1, "files": [], "rows": 1, "tokens": 1, "lineage": []}',
        '{"format_version": 1, "files": [], "rows": 1, "tokens": 1, "seq_len": "8"}',
        '{"format_version": 1, "files": [], "rows": true, "tokens": 1}',
        '{"format_version": 1, "files": [{"path": 1, "rows": 1, "tokens": 1, "bytes": 1}], "rows": 1, "tokens": 1}',
        '{"format_version": 2, "files": {"list": "../other/_fft_manifest.json", "count": 0}, "rows": 0, "tokens": 0}',
        "[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_named(text, tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match=f"{MANIFEST_NAME} is not a manifest"):
        read_manifest(tmp_path)


def test_a_manifest_of_the_future_asks_for_an_upgrade():
    future = json.loads(FACTS.to_json()) | {"format_version": 5, "unheard": 1}
    with pytest.raises(UserError, match="there has format version 5, this release reads up to 4: upgrade"):
        Manifest.from_json(json.dumps(future), "there")


def test_only_tables_with_images_have_the_second_format():
    texts, images = json.loads(FACTS.to_json()), replace(FACTS, vision={"merge": 2})
    assert texts["format_version"] == 1
    assert "vision" not in texts
    assert json.loads(images.to_json())["format_version"] == 2
    assert Manifest.from_json(images.to_json(), "it") == images


def test_states_of_a_folder(tmp_path):
    """Foreign, being written, finished, being rewritten: what a reader sees at each point."""
    table = tmp_path / "t"
    table.mkdir()
    assert read_manifest(table) is None
    begin_writing(table, {"job": "x"})
    with pytest.raises(UserError, match="t is unfinished: the job that wrote it was interrupted"):
        read_manifest(table)
    commit(table, FACTS)
    assert read_manifest(table) == FACTS
    assert [path.name for path in table.iterdir()] == [MANIFEST_NAME]
    begin_writing(table, {"job": "y"})
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(table)
    assert json.loads((table / WRITING_NAME).read_text()) == {"job": "y"}


def test_a_crash_in_mid_commit_leaves_the_table_unfinished(tmp_path, monkeypatch):
    begin_writing(tmp_path, {})

    def die(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module.os, "fsync", die)
    with pytest.raises(OSError, match="no space left"):
        commit(tmp_path, FACTS)
    assert not (tmp_path / MANIFEST_NAME).exists()
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path)


def tokenizer(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return tokenizer_sha256(folder)


def test_the_hash_follows_what_decides_the_ids(tmp_path):
    plain = tokenizer(tmp_path / "a", tokenizer__json="{}", tokenizer_config__json="1")
    assert tokenizer(tmp_path / "b", tokenizer__json="{}", tokenizer_config__json="2") == plain
    assert tokenizer(tmp_path / "c", tokenizer__json="{ }", tokenizer_config__json="1") != plain
    assert tokenizer(tmp_path / "d", vocab__json="{}") != plain  # the same bytes under another name
    # Tokenizers that are all code have nothing but their settings.
    code = tokenizer(tmp_path / "e", tokenizer_config__json="1")
    assert tokenizer(tmp_path / "f", tokenizer_config__json="2") != code


class TestOfVeryManyFiles:
    """Their list lies beside the manifest."""

    FILES = tuple(FileInfo(f"part-{i:05d}.parquet", i, 7 * i, 99 + i) for i in range(5))
    MANY = Manifest(FILES, 10, 70, TokenizerInfo("t", "aa", 9), seq_len=4, lineage={"job": "test"}, vision={"merge": 2})

    @pytest.fixture(autouse=True)
    def few_are_many(self, monkeypatch):
        monkeypatch.setattr(module, "INLINE", 4)

    def test_what_is_written_is_read(self, tmp_path):
        commit(tmp_path, self.MANY)
        name, _ = self.MANY.beside
        assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_NAME, name}
        said = json.loads((tmp_path / MANIFEST_NAME).read_text())
        assert (said["files"], said["format_version"]) == ({"count": 5, "list": name}, 3)
        assert read_manifest(tmp_path) == self.MANY
        assert read_manifest(tmp_path).beside == self.MANY.beside
        assert Manifest.from_json(self.MANY.to_json(), "here") == self.MANY

    def test_few_are_in_the_manifest_itself(self, tmp_path):
        few = replace(self.MANY, files=self.FILES[:4])
        commit(tmp_path, few)
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
        assert read_manifest(tmp_path) == few

    @pytest.mark.parametrize("content", [None, b"no parquet", "fewer"])
    def test_another_list_is_none(self, content, tmp_path):
        commit(tmp_path, self.MANY)
        path = tmp_path / self.MANY.beside[0]
        path.unlink()
        if content is not None:
            path.write_bytes(pack_list(self.FILES[:3])[1] if content == "fewer" else content)
        with pytest.raises(UserError, match=rf"{MANIFEST_NAME} is not a manifest \(.*write the table again"):
            read_manifest(tmp_path)

    @pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "part-00000.parquet", 7, None])
    def test_a_list_elsewhere_is_not_read(self, name, tmp_path):
        commit(tmp_path, self.MANY)
        said = json.loads((tmp_path / MANIFEST_NAME).read_text())
        said["files"]["list"] = name
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(said))
        with pytest.raises(UserError, match="names no list of files"):
            read_manifest(tmp_path)
