"""Values of other types than they should have, where the fuzz has found a traceback."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_tables import GRID_RULES
from internvl_originals import write_chat_model
from unit.security.strangers import make_run
from vision_models import save_model

from fft.data.table import Table
from fft.errors import UserError
from fft.images.rules import ImageLimits, ImageRules, load_rules
from fft.models.directory import load_config
from fft.report.page import page_of
from fft.report.run import read_run
from fft.text.encoder import load_tokenizer
from fft.weights.hf import WeightReader

WRONG = ["\0", [[]], {}, -1, 0.5, 1e308, True]


@pytest.fixture(scope="module", params=["qwen2_vl", "internvl"])
def sees(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("made") / request.param, request.param)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_settings_of_images_of_other_types_are_refused_or_understood(file, sees, tmp_path):
    given = json.loads((sees / file).read_text())
    assert load_rules(sees, ImageLimits(), (5, 6))
    for key in given:
        for value in WRONG:
            place = shutil.copytree(sees, tmp_path / "sees", dirs_exist_ok=True)
            (place / file).write_text(json.dumps(given | {key: value}))
            try:
                rules = load_rules(place, ImageLimits(), (5, 6))
            except UserError:
                continue
            assert ImageRules.of(rules.facts(), "here") == rules


@pytest.mark.parametrize("name", ["patch", "merge", "image_token", "mean", "family", "max_pixels"])
def test_a_manifest_whose_images_are_of_other_types_is_refused(name):
    for value in ("\0", [[]], -1, 0.5, None):
        with pytest.raises(UserError, match="says of its images what is not understood"):
            ImageRules.of(GRID_RULES.facts() | {name: value if name != "family" else [value]}, "manifest")


def test_a_part_of_a_model_that_is_none_is_refused(tmp_path):
    write_chat_model(tmp_path / "model", "qwen2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for value in ("evil", [1], 3):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"llm_config": value}))
        with pytest.raises(UserError):
            load_config(str(tmp_path / "model"), init=False)
        with pytest.raises(UserError, match=r"llm_config = .*, which describes no model"):
            WeightReader(tmp_path / "model")


def test_a_loss_that_is_none_is_no_loss(tmp_path):
    make_run(tmp_path)
    for loss in ("low", [1], {}, True, 10**400):
        (tmp_path / "run" / "step-1" / "training" / "state.json").write_text(json.dumps({"step": 1, "eval_loss": loss}))
        run = read_run(tmp_path / "run")
        assert [one.eval_loss for one in run.checkpoints] == [None]
        assert page_of([run])


def test_a_footer_whose_names_are_no_text_is_refused(tmp_path):
    pq.write_table(pa.table({"input_ids": pa.array([[1]], pa.list_(pa.int32()))}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    content = content.replace(b"input_ids", b"\xb9nput_ids").replace(b"ARROW:schema", b"x" * 12)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet"):
        Table.open(tmp_path).read(0)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "depth"])
@pytest.mark.parametrize("read", [lambda place: load_config(str(place), init=True), load_tokenizer])
def test_a_config_of_a_billion_layers_is_refused_before_anything_is_made(key, read, sees, tmp_path):
    place = shutil.copytree(sees, tmp_path / "sees")
    given = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(given | {"vision_config": {**given["vision_config"], key: 10**9}}))
    with pytest.raises(UserError, match=rf"config\.json: {key} is 1,000,000,000, and no model has more than 10,000"):
        read(place)
