"""What a run or a command would write to, on a disk and in a store alike."""

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from test_stored_run import write
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint import places
from fft.checkpoint.convert import main as convert
from fft.checkpoint.model_folder import copy_model
from fft.checkpoint.stored_run import run_at
from fft.data.replaceable import MODEL, check_replaceable
from fft.data.storage import Storage
from fft.data.views import view
from fft.errors import UserError
from fft.planning.outputs import check_outputs
from fft.planning.preflight import start_of
from fft.weights.files import load_tensors


@pytest.fixture(params=["disk", "store"])
def place(request, store, tmp_path):
    """A folder with a run of one checkpoint, ``run``, and a folder with nothing but a file, ``other``."""
    found = str(tmp_path) if request.param == "disk" else f"s3://lake/{tmp_path.name}"
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    write(run_at(f"{found}/run"), 3, ranks=1)
    run_at(f"{found}/other").put("file", "x")
    return found


def test_what_lies_there(place):
    assert places.lies_in(f"{place}/run/step-3/", f"{place}/run")
    assert not places.lies_in(f"{place}/runs", f"{place}/run")
    assert [places.is_a_file(f"{place}/{name}") for name in ("other/file", "other", "none")] == [True, False, False]
    assert [places.holds_something(f"{place}/{name}") for name in ("other", "none")] == [True, False]
    assert not places.holds_something(f"{place}/other", ["file"])
    for name, found in (("run/step-3/below/it", "run/step-3"), ("run/step-3", "run/step-3"), ("other", None)):
        assert places.checkpoint_of(f"{place}/{name}") == (found and f"{place}/{found}")
    assert places.checkpoint_replaced(f"{place}/run") == f"{place}/run/step-3"
    assert places.checkpoint_replaced(f"{place}/other") is None
    assert places.parts("s3a://lake/x/") == places.parts("s3://lake/x")


def test_what_another_rank_tries_is_in_nobodys_way(place, monkeypatch):
    """All ranks find out at the same time whether the places can be written to; each sees what the others put there."""
    tried, write_, scratch = [], Storage.write, tempfile.TemporaryDirectory

    def looks() -> None:
        tried.append(places.holds_something(f"{place}/fresh"))
        check_replaceable("fresh", f"{place}/fresh", MODEL)

    def written(storage, name, content):
        write_(storage, name, content)
        looks()

    class Watched(scratch):
        def __enter__(self):
            name = super().__enter__()
            looks()
            return name

    monkeypatch.setattr(Storage, "write", written)
    monkeypatch.setattr("fft.files.tempfile.TemporaryDirectory", Watched)
    if not place.startswith("s3"):
        Path(place, "fresh").mkdir()
    places.try_place("--output_dir", f"{place}/fresh", "model")
    assert tried == [False]


def arguments(place, **flags):
    given = {"from_ckpt": f"{place}/run", "train_data": f"{place}/table", "output_dir": f"{place}/out"} | flags
    return parse_arguments([f"--{name}={value}" for name, value in given.items() if value])


def test_where_a_run_begins_and_what_it_must_not_replace(place):
    args = arguments(place)
    model = start_of(args)
    assert load_tensors(view(model) / "model.safetensors")["w0"].unique().tolist() == [3]
    check_outputs(args, model, None)
    for flags, said in (
        ({"output_dir": f"{place}/other"}, "--output_dir .*/other exists and is not empty: choose another folder or"),
        ({"output_dir": f"{place}/run/step-3"}, "would replace or change the checkpoint .*/run/step-3"),
        ({"checkpoint": f"{place}/run"}, "--checkpoint .*/run exists and is not empty: choose another folder, add"),
        ({"checkpoint": f"{place}/r", "output_dir": f"{place}/r/tokens"}, "is a name that the run in --checkpoint"),
        ({"train_data": f"{place}/out/table"}, "--output_dir would replace .*/out and with it .* of --train_data"),
        ({"output_dir": f"{place}/other/file"}, "--output_dir .*/other/file is a file: name a folder"),
        (
            {"checkpoint": f"{place}/new", "upload": "/mnt/other"},
            "--upload /mnt/other mirrors a --checkpoint",
        ),
        ({"from_ckpt": f"{place}/other"}, "--from_ckpt: .*/other/step-.* is no checkpoint; .*/other holds: none"),
    ):
        with pytest.raises(UserError, match=said):
            check_outputs(arguments(place, **flags), start_of(arguments(place, **flags)), None)


def test_a_model_in_a_store_is_not_trained_in_place(store, tmp_path):
    place = f"s3://lake/{tmp_path.name}"
    run_at(f"{place}/model").put("config.json", "{}")
    args = arguments(place, from_ckpt=None, model=f"{place}/model", output_dir=f"{place}/model", overwrite=None)
    with pytest.raises(UserError, match="exists and is not empty"):
        check_outputs(args, start_of(args), None)
    args = parse_arguments([f"--model={place}/model", f"--output_dir={place}/model", "--train_data=t", "--overwrite"])
    with pytest.raises(UserError, match=r"--output_dir would replace .*/model and with it .*/model of --model"):
        check_outputs(args, start_of(args), None)


def test_convert_reads_and_writes_places(place, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).save_pretrained(tmp_path / "tiny")
    copy_model(tmp_path / "tiny", f"{place}/model")
    convert([f"{place}/model", f"{place}/converted", "--dtype", "bf16"])
    ours = load_tensors(view(f"{place}/converted/model.safetensors"))
    theirs = load_file(tmp_path / "tiny" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    for given, said in (
        ([f"{place}/model", f"{place}/converted"], r"/converted exists and is not empty: choose another folder or add"),
        ([f"{place}/run", f"{place}/out", "--tag", "step-9"], r"step-9 is no checkpoint; .*/run holds: step-3"),
        ([f"{place}/model", f"{place}/run", "--overwrite"], r"would replace or change the checkpoint .*/run/step-3"),
        ([f"{place}/model", f"{place}/model", "--overwrite"], r"/model would replace .*/model, which is read"),
    ):
        with pytest.raises(UserError, match=said):
            convert(given)
