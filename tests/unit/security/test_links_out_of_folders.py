"""A directory that was fetched may have links to a user's secrets, pipes, and names of files that lie elsewhere."""

import json
import os
import shutil

import pytest
from unit.checkpoint.test_folder import make
from unit.security.strangers import make_adapter, make_model

from fft.checkpoint import folder
from fft.checkpoint.adapter import AdapterReader
from fft.checkpoint.conversion import open_source
from fft.checkpoint.convert import main as convert
from fft.checkpoint.run import LocalRun
from fft.data.model_files import check_directory
from fft.errors import UserError
from fft.files import is_plain
from fft.models.directory import load_config
from fft.text.encoder import load_tokenizer
from fft.weights.hf import WeightReader, write_metadata

SECRET = '{"password": "hunter2"}'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    make_model(place / "model")
    make_adapter(place / "adapter")
    return place


@pytest.fixture
def model(tmp_path, made):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.json").write_text(SECRET)
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return shutil.copytree(made / "model", tmp_path / "model")


def link(file, target):
    file.unlink(missing_ok=True)
    file.symlink_to(target)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling_x.py"])
def test_what_a_link_leads_to_is_not_copied(model, tmp_path, name, relative):
    link(model / name, "../secrets/key.json" if relative else tmp_path / "secrets" / "key.json")
    said = rf"{name} is a link to .*secrets/key.json, outside of its directory"
    for read in (
        lambda: load_config(str(model), init=False),
        lambda: load_tokenizer(model),
        lambda: convert([str(model), str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match=said):
            read()
    assert not (tmp_path / "out").exists()


def test_a_link_that_appears_while_a_run_trains_is_not_copied(model, tmp_path):
    config = load_config(str(model), init=False)
    link(model / "tokenizer.json", "../secrets/key.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="outside of its directory"):
        write_metadata(tmp_path / "out", config, None, 1, model)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_snapshot_of_the_hub_s_cache_is_made_of_links(model, tmp_path):
    """``models--x/snapshots/REVISION/FILE -> ../../blobs/HASH``; the snapshot itself may be a link's end, too."""
    hub = tmp_path / "models--someone--model"
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(hub / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (tmp_path / "mine").symlink_to(snapshot)
    convert([str(tmp_path / "mine"), str(tmp_path / "out")])
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    load_tokenizer(tmp_path / "out")
    link(snapshot / "tokenizer.json", "../../refs/main")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(SECRET)
    with pytest.raises(UserError, match="outside of its directory"):
        load_tokenizer(snapshot)


def test_blobs_that_are_a_link_are_none(model, tmp_path):
    hub = tmp_path / "hub"
    (hub / "snapshots").mkdir(parents=True)
    model.rename(hub / "snapshots" / "1")
    (hub / "blobs").symlink_to(tmp_path / "secrets")
    link(hub / "snapshots" / "1" / "tokenizer.json", "../../blobs/key.json")
    with pytest.raises(UserError, match="outside of its directory"):
        check_directory(hub / "snapshots" / "1")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(model, name, kind):
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    for read in (
        lambda: load_config(str(model), init=False),
        lambda: load_tokenizer(model),
        lambda: WeightReader(model),
    ):
        with pytest.raises(UserError, match=rf"{name} is no file, but a pipe or a device"):
            read()


NAMES = [
    "../secrets/weights.safetensors",
    "/tmp/x.safetensors",
    "a/b.safetensors",
    "..",
    "",
    "x\0",
    "\udcff",
    "x" * 300,
    3,
]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_of_its_directory(model, name):
    index = model / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = dict.fromkeys(told["weight_map"], name)
    index.write_text(json.dumps(told))
    assert not is_plain(name)
    with pytest.raises(UserError, match="is no index of safetensors files"):
        WeightReader(model)


def test_weights_do_not_lie_elsewhere(model, tmp_path):
    for directory, name in (
        (model, "model-00001-of-00002.safetensors"),
        (tmp_path / "adapter", "adapter_model.safetensors"),
    ):
        (directory / name).rename(tmp_path / "secrets" / name)
        link(directory / name, tmp_path / "secrets" / name)
    with pytest.raises(UserError, match="outside of its directory"):
        WeightReader(model)
    with pytest.raises(UserError, match="outside of its directory"):
        AdapterReader(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["../key.json", "/etc/hostname", "a/../../key.json", "./config.json", "training//x"])
def test_checksums_are_of_a_checkpoint_s_own_files(tmp_path, name):
    checkpoint = make(tmp_path, 1)
    (tmp_path / "key.json").write_text(SECRET)
    with open(checkpoint / folder.SUMS, "a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    assert "which is no file of a checkpoint" in (folder.fault(checkpoint) or "")
    with pytest.raises(UserError, match="which is no file of a checkpoint"):
        open_source(str(tmp_path), None, None, None)


def test_checksums_of_links_and_pipes_are_not_taken(tmp_path):
    checkpoint = make(tmp_path, 1)
    (tmp_path / "key.json").write_text(SECRET)
    sums = (checkpoint / folder.SUMS).read_text()
    for name, make_it in (("a", lambda file: file.symlink_to("../key.json")), ("b", os.mkfifo)):
        make_it(checkpoint / name)
        (checkpoint / folder.SUMS).write_text(f"{sums}{folder.digest(tmp_path / 'key.json')}  {name}\n")
        assert "is no file of its checkpoint, but a link out of it, a pipe" in (folder.fault(checkpoint) or "")
        (checkpoint / name).unlink()


@pytest.mark.parametrize("name", ["../../etc", "/etc", "step-1/../..", "step-x", ""])
def test_latest_names_a_checkpoint(tmp_path, name):
    make(tmp_path, 1)
    (tmp_path / folder.LATEST).write_text(f"{name}\n")
    with pytest.raises(UserError, match="latest names no checkpoint"):
        LocalRun(tmp_path).tag_of(folder.LATEST)


def test_the_state_of_a_checkpoint_is_its_own(tmp_path):
    checkpoint = make(tmp_path, 1)
    link(checkpoint / folder.STATE, tmp_path / "key.json")
    (tmp_path / "key.json").write_text(SECRET)
    with pytest.raises(UserError, match="outside of its directory"):
        folder.read_state(checkpoint)
    with pytest.raises(UserError, match="outside of its directory"):
        LocalRun(tmp_path).losses()


def test_json_that_is_none_or_too_deep_is_one_sentence(model):
    for text in ("{", "[" * 100_000, "\xff"):
        (model / "generation_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"generation_config\.json is no JSON .*: restore it"):
            check_directory(model)
