"""Rows of prompts with images to rows of answers, as tasks make them, without Spark."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of

from fft.corpus.files import find_sources
from fft.data.known import LeftOut
from fft.images.rules import ImageSettings
from fft.serve.engines import EngineOptions
from fft.serve.sampling import Sampling
from fft.text.records import Malformed
from spark_jobs.generation.answers import Asking, answer_chunks
from spark_jobs.generation.engine import Wanted, worker_engine
from spark_jobs.generation.fields import fields_of, infer, turns_in
from spark_jobs.generation.frames import GenerateRows
from spark_jobs.generation.prompts import PromptKeys, prompt_splits, read_chunks

KEYS = PromptKeys.of("prompt", "id", True)


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """Of a small Qwen2-VL, with a folder of pictures `0.png` to `5.png`."""
    folder = tmp_path_factory.mktemp("generation")
    for number, data in enumerate(pictures(6)):
        (folder / f"{number}.png").write_bytes(data)
    model = make_vision_model(folder / "model", "qwen2_vl")
    wanted = Wanted(str(model), EngineOptions("transformers"), images=ImageSettings(str(folder)))
    return Asking(wanted, Sampling(max_new_tokens=12), KEYS)


def told(row: dict, folder: Path) -> list[bytes]:
    return [image["bytes"] or (folder / image["path"]).read_bytes() for image in row["images"] or ()]


def test_lines_in_every_form_are_answered_and_tell_their_images(asking, tmp_path):
    forms, meant = prompts_of(pictures(6))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": i} | form) + "\n" for i, form in enumerate(forms)))
    splits = prompt_splits(find_sources([tmp_path / "in.jsonl"], "id", LeftOut()))
    fields = fields_of([infer([{"id": 0} | form for form in forms])], [], "prompt", images=True)
    rows = []
    with worker_engine(asking.wanted) as loaded:
        for part in range(splits[-1].part + 1):
            chunks = read_chunks(part, [split for split in splits if split.part == part], fields, KEYS)
            for answered in answer_chunks(loaded, asking, chunks):
                answered.check()
                rows += answered.table(fields, False).to_pylist()
    assert [row["text"] for row in rows] == answers_of_transformers(Path(asking.wanted.model), meant)
    folder = Path(asking.wanted.images.folder)
    for row, (messages, images) in zip(rows, meant, strict=True):
        assert told(row, folder) == images
        contents = [turn["content"] for turn in row["messages"]]
        goes_on = messages[-1]["role"] == "assistant"
        assert sum(content.count("<image>") for content in contents) == len(images)
        assert len(contents) == len(messages) + (not goes_on)
        assert contents[-1].endswith(row["text"])


def test_columns_of_images_are_replaced_by_those_of_conversations(asking):
    made = pictures(3)
    table = pa.table({"prompt": ["<image> a", "b"], "image": [{"bytes": made[2], "path": "x"}, None], "n": [1, 2]})
    fields = fields_of([table.schema], [turns_in(table.schema, KEYS.turns)], "prompt", "error", images=True)
    work = GenerateRows(asking, fields, table.schema.names, fail=False)
    out = pa.Table.from_batches(list(work(iter(table.to_batches()))))
    assert out.schema.names == [
        "prompt",
        "n",
        "messages",
        "text",
        "finish_reason",
        "tokens",
        "sample",
        "images",
        "error",
    ]
    one, other = out.to_pylist()
    assert (one["images"], other["images"]) == ([{"bytes": made[2], "path": None}], None)
    assert [row["messages"][0]["content"] for row in (one, other)] == ["<image> a", "b"]
    bad = pa.table({"prompt": ["a"], "image": [{"bytes": b"none", "path": "x"}], "n": [1]})
    (row,) = pa.Table.from_batches(list(work(iter(bad.to_batches())))).to_pylist()
    assert "1 images beside the turns are in none" in row["error"]


def test_without_reading_images_they_are_refused_by_name(asking):
    plain = Asking(Wanted(asking.wanted.model, asking.wanted.options), asking.sampling, PromptKeys())
    with worker_engine(plain.wanted) as loaded, pytest.raises(Malformed, match="images are read with --image_path"):
        plain.renderer(loaded).render({"messages": [{"user": "x"}], "images": ["0.png"]})
