"""Small files of strangers: what is no file is not waited for, what names a million values is not written out, what
names other places is not gone to."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from unit.security.strangers import REFERENCE, make_all

from fft.arguments import resolve
from fft.checkpoint.card import card_beside, card_of
from fft.data.pairs import Reference, keep_reference, read_reference
from fft.data.table import Table
from fft.errors import UserError
from fft.json_text import small_text
from fft.plan.hardware import read_machine
from fft.report.page import page_of
from fft.report.run import read_run
from fft.text.encoder import load_tokenizer
from fft.training.sample_answers import read_prompts
from fft.yaml_text import yaml_value

TENFOLD = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(12))
SECRET = "sk-this-is-what-nobody-may-see"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    make_all(place)
    return place


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def readers(path):
    """What reads a file that is named itself."""
    yield lambda: small_text(path)
    yield lambda: read_machine(path)
    yield lambda: read_prompts(str(path), None, None, 64)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    place = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    for read in readers(place):
        with pytest.raises((UserError, ValueError), match="it is no file"):
            read()


def test_a_file_that_is_too_long_is_refused(tmp_path):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    for read in readers(tmp_path / "sparse"):
        with pytest.raises((UserError, ValueError), match="bytes or more"):
            read()


@pytest.mark.parametrize(
    "text",
    [
        *(TENFOLD, "&a [*a]", "&a {b: *a}", "[" * 100_000, "a: !!python/object/apply:os.system [ls]", "!!int ''"),
        *("!!bool x", "!!timestamp x", "!!float ''", "? {a: b}", "a: [", "\x00"),
    ],
)
def test_yaml_that_is_none_or_too_much_is_one_error(text, run):
    with pytest.raises(ValueError, match=r"it is (no YAML|nested too deeply)"):
        yaml_value(text)
    for name in ("arguments", "data", "environment"):
        kept = (run / f"{name}.yaml").read_text()
        (run / f"{name}.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"{name}\.yaml (cannot be read|holds no settings)"):
            read_run(run)
        (run / f"{name}.yaml").write_text(kept)
    (run / "step-1" / "README.md").write_text(f"---\n{text}\n---\nmine")
    assert card_beside(run / "step-1") is None
    assert "mine" not in card_of({"step": 1, "arguments": {"model": str(run / "step-1")}}, "llama")


def test_yaml_with_references_as_we_write_it_is_read():
    both = ["a"]
    assert yaml_value(yaml.safe_dump({"one": both, "two": both})) == {"one": both, "two": both}


def test_a_page_repeats_no_file_that_a_run_only_links_to(run, tmp_path):
    """The user's own settings, which would stand on a page that is handed around."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"password": SECRET}))
    for name in ("arguments.yaml", "data.yaml", "environment.yaml", "metrics.jsonl"):
        (run / name).rename(tmp_path / "kept")
        (run / name).symlink_to(tmp_path / "own.yaml")
        with pytest.raises(UserError, match=f"{name} is a link to .*outside of its directory"):
            read_run(run)
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(UserError, match=f"{name} is no file, but a pipe or a device"):
            read_run(run)
        (run / name).unlink()
        (tmp_path / "kept").rename(run / name)


def test_a_page_goes_to_no_place_that_a_run_names(run, tmp_path, monkeypatch):
    """Settings of a stranger's run may name a model and tables anywhere: a pipe, or a store that learns who asks."""
    os.mkfifo(tmp_path / "config.json")
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    gone_to = {"model": str(tmp_path), "from_ckpt": str(tmp_path), "train_data": str(tmp_path / "config.json")}
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings | gone_to))
    assert "llama" in read_run(run).planned
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings | {"seq_len": "long"}))
    assert read_run(run).planned == "not known: arguments.yaml has settings of other types"
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings | {"seq_len": 0}))
    assert read_run(run).planned.startswith("not known: ")
    (run / "step-1" / "config.json").rename(tmp_path / "x")
    (run / "step-1" / "SHA256SUMS").unlink()
    assert read_run(run).planned == "known with the first checkpoint"
    assert page_of([read_run(run)])


def test_steps_that_are_none_are_counted(run):
    steps = ['"a"', "1e308", "-1", "[1]", "null", str(10**400), str(1 << 60)]
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in (*steps, 1)))
    found = read_run(run)
    assert (found.unread, found.steps) == (len(steps), 1)
    assert page_of([found])


@pytest.mark.parametrize("latest", ["pipe", "../../elsewhere"])
def test_a_run_is_begun_from_in_its_folder(latest, run, tmp_path):
    """--dtype of a run without a step is the checkpoint's own, and no other folder's, and nothing is waited for."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text('{"dtype": "float16"}')
    given = {"from_ckpt": str(run), "train_data": "x", "max_steps": 0, "dry_run": True, "output_dir": "x"}
    (run / "latest").unlink()
    if latest == "pipe":
        (run / "step-1" / "config.json").unlink()
        os.mkfifo(run / "step-1" / "config.json")
        latest = "step-1"
    (run / "latest").write_text(f"{latest}\n")
    assert resolve(given).dtype == "bf16"


@pytest.mark.parametrize("value", [".inf", ".nan", "1.0e+300", "1" + "0" * 400, "-1", "true"])
@pytest.mark.parametrize("name", ["tflops", "memory", "attention"])
def test_rates_that_no_machine_has_are_refused(name, value, made, tmp_path):
    lines = (made / "machine" / "machine.yaml").read_text().splitlines()
    rate = f"[8, {value}, 1]" if name == "attention" else value
    kept = [f"  {name}: {rate}" if line.startswith(f"  {name}: ") else line for line in lines]
    if kept == lines:
        kept.insert(lines.index("device:") + 1, f"  {name}: {rate}")
    (tmp_path / "m.yaml").write_text("\n".join(kept))
    with pytest.raises(UserError, match=rf"device\.{name} must be"):
        read_machine(tmp_path / "m.yaml")


@pytest.fixture
def pairs(made, tmp_path):
    return Table.open(shutil.copytree(made / "pairs", tmp_path / "pairs"))


def plant(pairs, keys, values, **names):
    columns = {names.get("row", "row"): keys, names.get("value", "log_probability"): values}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    pairs.storage.write(REFERENCE, sink.getvalue().to_pybytes())


def test_a_planted_reference_is_no_more_than_log_probabilities(pairs):
    """The right name, which a stranger can compute of a public model, and anything in it."""
    known = read_reference(pairs.storage, REFERENCE, pairs.tokens)
    keys, values = known.keys, known.values
    wrong = [np.full_like(values, number) for number in (np.nan, np.inf, -np.inf, 7)]
    for planted in wrong:
        plant(pairs, keys, planted)
        with pytest.raises(UserError, match=f"{REFERENCE} holds numbers that are no log-probabilities: remove it"):
            read_reference(pairs.storage, REFERENCE, pairs.tokens)
    many = np.zeros(pairs.tokens + 1, np.int64)
    for planted in (
        (keys.astype(str), values),
        (keys, values.astype(str)),
        (keys.astype(np.float64), values),
        (many, many.astype(np.float32)),
        (pa.array([[1]] * len(keys)), values),
    ):
        plant(pairs, *planted)
        with pytest.raises(UserError, match="holds no reference log-probabilities"):
            read_reference(pairs.storage, REFERENCE, pairs.tokens)
    plant(pairs, pa.array([None] * len(keys), pa.int64()), values)
    with pytest.raises(UserError, match="holds numbers that are no log-probabilities"):
        read_reference(pairs.storage, REFERENCE, pairs.tokens)
    plant(pairs, keys[::-1].copy(), values)
    with pytest.raises(UserError, match="holds numbers that are no log-probabilities"):
        read_reference(pairs.storage, REFERENCE, pairs.tokens)


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "link"])
def test_a_planted_reference_is_neither_waited_for_nor_written_through(kind, pairs, tmp_path):
    known, file = read_reference(pairs.storage, REFERENCE, pairs.tokens), tmp_path / "pairs" / REFERENCE
    (tmp_path / "victim").write_text("diary")
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "large":
        file.touch()
        os.truncate(file, 1 << 40)
        with pytest.raises(UserError, match="is too large for this table's"):
            read_reference(pairs.storage, REFERENCE, pairs.tokens)
        return
    else:
        file.symlink_to("/dev/zero" if kind == "device" else tmp_path / "victim")
    if kind == "link":
        with pytest.raises(UserError, match="holds no reference log-probabilities"):
            read_reference(pairs.storage, REFERENCE, pairs.tokens)
    else:
        assert read_reference(pairs.storage, REFERENCE, pairs.tokens) is None
    keep_reference(pairs.storage, REFERENCE, Reference(known.keys, known.values))
    assert (tmp_path / "victim").read_text() == "diary"
    assert not file.is_symlink()
    assert file.is_file()


def test_prompts_of_strangers_are_refused_by_line(made, tmp_path):
    tokenizer = load_tokenizer(made / "model")
    for line in ("[" * 100_000, '{"prompt": 1}', "null", '{"messages": [[]]}', '{"prompt": ""}', "\\ud800"):
        (tmp_path / "p").write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"--sample_prompts .*, line 1: "):
            read_prompts(str(tmp_path / "p"), tokenizer, None, 64)
