"""Chats with images: ids, labels and grids are those of transformers; no cut falls inside of an image."""

import base64
import json
import os
from collections import Counter

import numpy as np
import pytest
from vision_models import FAMILIES, TRIMMING, chat_of, picture, save_model, theirs

from fft.errors import UserError
from fft.images.rules import ImageLimits, ImageSettings
from fft.text.chat import load_chat
from fft.text.cuts import cut_chat
from fft.text.encoder import Encoder
from fft.text.records import Malformed

#: Chats a family: 500 for the whole proof.
CHATS = int(os.environ.get("FFT_VISION_CHATS", "25"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.png").write_bytes(picture(np.random.default_rng(0), "png"))
    return folder


def load(model, files, max_len=None, **limits):
    return load_chat(model, "id", max_len, ImageSettings(str(files), ImageLimits(**limits)))[0]


def rows_of(chat, *records):
    documents = [chat.parse("json", json.dumps(record).encode(), None) for record in records]
    batch, counts = chat.token_rows(documents, Encoder(chat.recipe))
    assert batch.schema.names == list(chat.columns_out)
    return batch.to_pylist(), counts


def a_png(seed=0):
    return "data:image/png;base64," + base64.b64encode(picture(np.random.default_rng(seed), "png")).decode()


def turns(content, answer="yes"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_chats_are_those_of_transformers(models, files, family):
    chat, rng = load(models[family], files), np.random.default_rng(FAMILIES.index(family))
    pad = chat.images.rules.image_token
    records, expected = [], []
    for number in range(CHATS):
        record, messages, images = chat_of(rng, files, number)
        if family == "internvl":  # its template writes a line end after an image, and no text here begins with one
            assert "<image>\n" not in json.dumps(record)
        records.append(record)
        expected.append((images, messages, *theirs(models[family], messages, images)))
    rows, counts = rows_of(chat, *records)
    assert len(rows) == CHATS
    assert counts["trained_tokens"] == sum(label >= 0 for row in rows for label in row["labels"])
    for row, record, (images, messages, ids, values) in zip(rows, records, expected, strict=True):
        assert row["doc_ids"] == [record["id"]]
        assert row["input_ids"] == ids
        assert row["images"] == images
        grids = np.array(row["image_grids"]).reshape(-1, 3)
        if family == "internvl":
            assert grids[:, 0].tolist() == np.array(values.get("num_patches", [])).tolist()
        elif images:
            assert grids.tolist() == values["image_grid_thw"].tolist()
        assert 4 * ids.count(pad) == grids.prod(1).sum()
        labels, answers = np.array(row["labels"]), [m["content"] for m in messages if m["role"] == "assistant"]
        assert (labels[np.array(ids) == pad] == -100).all()
        assert trained_texts(chat, labels) == [answer + "<|im_end|>" for answer in answers]


def trained_texts(chat, labels):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(chat.recipe.json)
    stretches = np.split(labels, np.flatnonzero(np.diff(labels >= 0)) + 1)
    return [tokenizer.decode(s.tolist(), skip_special_tokens=False) for s in stretches if len(s) and s[0] >= 0]


def test_all_forms_of_a_chat_are_one(models, files):
    chat, name = load(models["qwen2_vl"], files), "a.png"
    data = base64.b64encode((files / name).read_bytes()).decode()
    url, text = f"data:image/png;base64,{data}", {"type": "text", "text": "see "}
    forms = [
        [{"user": ["see <image>", name]}, {"assistant": "yes"}],
        turns([text, {"type": "image_url", "image_url": {"url": url}}]),
        turns([text, {"type": "image_url", "image_url": name}]),
        turns([text, {"type": "image", "image": f"file://{name}"}]),
        turns([text, {"type": "image", "path": str(files / name)}]),
        turns([text, {"type": "image", "base64": data}]),
        turns([text, {"image": name}]),
        {"messages": turns("see <image>"), "images": [name]},
        {"messages": turns("see <image>"), "image": url},
        {"conversations": [{"from": "human", "value": "see <image>"}, {"from": "gpt", "value": "yes"}], "image": name},
        {"prompt": "see <image>", "completion": "yes", "images": [name]},
        {"messages": turns("see <image>"), "images": [{"bytes": data, "path": None}]},
        {"messages": turns([text, {"type": "image"}]), "images": [{"path": name}]},
    ]
    rows, _ = rows_of(chat, *forms)
    assert all(row == rows[0] for row in rows)
    other = rows_of(chat, [{"user": ["see <image>", a_png(3)]}, {"assistant": "yes"}])[0][0]
    assert other["doc_ids"] != rows[0]["doc_ids"]  # of the same text, but another image


def test_a_mark_without_images_stays_a_text(models, files):
    (row,), _ = rows_of(load(models["qwen2_vl"], files), turns("what does <image> mean?"))
    assert (row["images"], row["image_grids"]) == ([], [])


def test_a_line_end_after_a_mark_is_the_one_of_the_template(models, files):
    chat = load(models["internvl"], files)
    rows, _ = rows_of(chat, turns(["<image>\nwhat?", "a.png"]), turns([{"image": "a.png"}, {"text": "what?"}]))
    assert rows[0] == rows[1]


def test_a_template_that_trims_texts_is_followed(tmp_path, files):
    model = save_model(tmp_path / "m", "qwen2_vl", TRIMMING)
    chat = load(model, files)
    (row,), _ = rows_of(chat, turns([{"type": "text", "text": "  see "}, {"image": "a.png"}, {"text": "  "}]))
    parts = [{"type": "text", "text": "  see "}, {"type": "image"}, {"type": "text", "text": "  "}]
    ids, _ = theirs(model, turns(parts), [(files / "a.png").read_bytes()])
    assert row["input_ids"] == ids
    assert trained_texts(chat, np.array(row["labels"])) == ["yes<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([{"user": ["<image> <image>", "a.png"]}], r"turn 1 \(user\) has 2 <image>, for which 1 images are left"),
        ([{"user": ["<image>", "a.png", "a.png"]}], "has 1 <image> and 2 images"),
        ([{"user": ["<image>", "b.png"]}], r"image 1 \(b.png\) cannot be read: No such file"),
        ([{"user": ["<image>", "../a.png"]}], "lies outside of image_path"),
        ([{"user": ["<image>", "/etc/passwd"]}], "lies outside of image_path"),
        ([{"user": ["<image>", "http://a/b.png"]}], "is at http://a/b.png: download it"),
        ([{"user": ["<image>", 3]}], "the list of turn 1 .user. holds int, no string"),
        ([{"user": []}], "the list of turn 1 .user. holds nothing"),
        ([{"user": {"a": 1}}], "the content of turn 1 .user. is dict, neither a string nor a list"),
        ([{"user": ["<image>", "data:image/png,abc"]}], "data: URL without ;base64"),
        ([{"user": ["<image>", "data:image/png;base64,####"]}], "is no base64"),
        ([{"user": ["<image>", "data:image/png;base64,AAAA"]}], "image 1 cannot be read .it is no image."),
        ([{"user": ["<image> <|image_pad|>", "a.png"]}], "a text holds <|image_pad|>, which stands for an image"),
        ([{"user": "<|image_pad|>"}], "a text holds"),
        ([{"user": [{"type": "video", "video": "x"}]}], "part 1 of turn 1 .user. is of type 'video'"),
        ([{"user": [{"type": "image"}]}], "part 1 of turn 1 .user. names no image"),
        ([{"user": [{"type": "image", "image": "a.png", "path": "a.png"}]}], "names image and path"),
        ([{"user": [{"image": "a.png", "max_pixels": 9}]}], "has max_pixels, which is not supported"),
        ([{"user": [{"type": "text"}]}], "is of type text and has none"),
        ([{"user": [{"type": "image", "image": 3}]}], "is no image: give a file's name"),
        ({"messages": [{"user": "a <image>"}], "images": ["a.png", "a.png"]}, "1 images beside the turns are in none"),
        ({"messages": [{"user": "a"}], "images": ["a.png"], "image": "a.png"}, "both images and image are there"),
        ({"messages": [{"user": "a"}], "videos": ["a.mp4"]}, "key videos beside the turns"),
    ],
)
def test_malformed_chats_are_named(models, files, record, reason):
    chat = load(models["qwen2_vl"], files)
    holder = record["messages"] if isinstance(record, dict) else record
    holder.append({"assistant": "yes"})
    with pytest.raises(Malformed, match=reason.replace("<|image_pad|>", r"<\|image_pad\|>")):
        chat.parse("json", json.dumps(record).encode(), None)


def test_without_image_path_contents_are_texts(models):
    chat, _ = load_chat(models["qwen2_vl"], "id", None)
    assert "images" not in chat.columns_out
    with pytest.raises(Malformed, match=r"the content of turn 1 .user. is list, not a string"):
        chat.parse("json", json.dumps([{"user": ["<image>", "a.png"]}, {"assistant": "y"}]).encode(), None)
    with pytest.raises(Malformed, match="key images beside the turns: images are read with --image_path"):
        chat.parse("json", json.dumps({"messages": turns("<image>"), "images": ["a"]}).encode(), None)


def test_keys_of_parts_that_nothing_uses_are_counted(models, files):
    unused, part = Counter(), {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}, "cache": 1}
    load(models["qwen2_vl"], files).parse("json", json.dumps(turns([part])).encode(), None, unused)
    assert unused == {"detail of an image": 1, "cache of a part": 1}


def test_an_image_of_an_assistant_is_not_trained_on(models, files):
    chat = load(models["qwen2_vl"], files)
    (row,), _ = rows_of(chat, turns("draw", [{"text": "here "}, {"image": "a.png"}, {"text": "!"}]))
    assert trained_texts(chat, np.array(row["labels"])) == ["here ", "!<|im_end|>"]


def test_no_cut_falls_inside_of_an_image(models, files):
    rng = np.random.default_rng(9)
    records = [chat_of(rng, files, number)[0] for number in range(60)]
    long = "a cat sits on a mat " * 9
    for record in records:
        record["messages"] += [{"user": "more"}, {"assistant": long}]
    for family in ("qwen2_vl", "internvl"):
        whole = {row["doc_ids"][0]: row for row in rows_of(load(models[family], files), *records)[0]}
        chat = load(models[family], files, max_len=48)
        pad = chat.images.rules.image_token
        rows, counts = rows_of(chat, *records)
        assert max(len(row["input_ids"]) for row in rows) <= 48
        assert counts["cut_conversations"] > 20
        kept = 0
        for row in rows:
            pads, grids = (
                np.count_nonzero(np.array(row["input_ids"]) == pad),
                np.array(row["image_grids"]).reshape(-1, 3),
            )
            assert 4 * pads == grids.prod(1).sum()
            assert set(row["images"]) <= set(whole[row["doc_ids"][0]]["images"])
            kept += len(row["images"])
        assert kept + counts["dropped_images"] == sum(len(row["images"]) for row in whole.values())
        trained = sum(label >= 0 for row in whole.values() for label in row["labels"])
        assert counts["trained_tokens"] == trained


def test_the_rules_of_cuts_with_images():
    turn = [(20, 24, 25, True)]
    assert cut_chat(25, turn, 10, [(12, 17)]) == [(17, 25)]  # history is trimmed where the image ends
    assert cut_chat(25, turn, 10, [(3, 8)]) == [(15, 25)]
    assert cut_chat(25, [(2, 24, 25, True)], 10, [(5, 12)]) == [(0, 5), (5, 15), (15, 25)]


def test_an_image_longer_than_a_row_is_malformed(models, files):
    chat = load(models["qwen2_vl"], files, max_len=5)
    with pytest.raises(Malformed, match=r"image 1 \(a.png\) has \d+ tokens and 2 around them, more than max_len 5"):
        chat.parse("json", json.dumps(turns(["<image>", "a.png"])).encode(), None)


def test_a_directory_whose_parts_do_not_agree_is_refused(tmp_path, files):
    model = save_model(tmp_path / "m", "qwen2_vl", "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(UserError, match=r"its chat template .*image"):
        load(model, files)
    model = save_model(tmp_path / "n", "qwen2_vl")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_token_id": 1000}))
    with pytest.raises(UserError, match="lacks the token 1000"):
        load(model, files)


def test_random_contents_are_read_or_malformed(models, files):
    chat, rng = load(models["qwen2_vl"], files, max_len=40), np.random.default_rng(11)
    leaves = [
        "a.png",
        "<image>",
        "<image>\n",
        "b",
        "",
        "\0",
        "\ud800",
        "..",
        "/",
        "data:,",
        "data:x;base64,AA",
        "file://a.png",
    ]
    leaves += [
        None,
        0,
        1.5,
        True,
        a_png(),
        "<|image_pad|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "~",
        "a" * 5000,
    ]
    keys = ["type", "text", "image", "image_url", "url", "path", "base64", "bytes", "video", "detail", "max_pixels"]
    kinds = ["text", "image", "image_url", "video", ["image"], None]

    def value(depth):
        choice = rng.integers(0, 10)
        if depth > 2 or choice < 4:
            return leaves[rng.integers(0, len(leaves))]
        if choice < 7:
            return [value(depth + 1) for _ in range(rng.integers(0, 4))]
        found = {keys[i]: value(depth + 1) for i in rng.integers(0, len(keys), int(rng.integers(0, 4)))}
        return found | ({"type": kinds[rng.integers(0, len(kinds))]} if rng.integers(0, 2) else {})

    read, said = [], []
    for _ in range(800):
        record = {"messages": [{"role": "user", "content": value(0)}, {"role": "assistant", "content": "yes"}]}
        for key in ("images", "image"):
            if not rng.integers(0, 4):
                record[key] = value(1)
        try:
            read.append(chat.parse("json", json.dumps(record).encode(), None))
        except Malformed as error:
            said.append(str(error))
    assert len(read) > 25
    assert not [text for text in said if "\n" in text]
    batch, _ = chat.token_rows(read, Encoder(chat.recipe))
    assert max(batch["input_ids"].value_lengths().to_pylist()) <= 40
