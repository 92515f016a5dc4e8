"""JSON of strangers that is none, nested or with digits without an end: one sentence, which names the file."""

import pytest

from fft.data.manifest import MANIFEST_NAME, read_manifest
from fft.errors import UserError
from fft.images.rules import read_object
from fft.json_text import json_value
from fft.models.directory import load_config
from fft.report.run import read_run
from fft.text.records import Malformed, load_json

DEEP = "[" * 200_000
MALFORMED = [DEEP, '{"a":' * 200_000, "1" * 10_000, "\ufeff{}", "{", "\0", "nul", '{"a": 1} 2']


@pytest.mark.parametrize("text", MALFORMED)
def test_all_that_is_wrong_is_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"."):
        json_value(text)
    with pytest.raises(Malformed, match="not valid JSON"):
        load_json(text)


def test_bytes_that_are_no_unicode():
    with pytest.raises(ValueError, match="decode"):
        json_value(b'{"a": "\xff"}')


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST_NAME, lambda file: read_manifest(file.parent)),
        ("config.json", lambda file: read_object(file)),
        ("config.json", lambda file: load_config(str(file), init=True)),
    ],
)
def test_files_are_named(name, read, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("text", MALFORMED[:3])
def test_settings_of_a_run_too(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP}\n")
    (tmp_path / "arguments.yaml").write_text(text)
    with pytest.raises(UserError, match=r"arguments\.yaml"):
        read_run(tmp_path)
