import inspect
import json

from transformers import AutoTokenizer

from fft.data.manifest import tokenizer_sha256
from fft.quickstart.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

TEXTS = [inspect.getsource(json), inspect.getsource(inspect), inspect.getsource(json.decoder)]


def test_same_texts_give_the_same_tokenizer_and_it_loads(tmp_path):
    for name in ("a", "b"):
        save_tokenizer(train_tokenizer(iter(TEXTS), 600), tmp_path / name)
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (len(loaded), loaded.eos_token) == (600, END_OF_TEXT)
    for text in (*TEXTS, "  leading, trailing \n\n", "\u00e4\u4e2d\U0001f40d\t\x00"):
        ids = loaded(text)["input_ids"]
        assert loaded.decode(ids) == text
        assert loaded.eos_token_id not in ids


def test_saving_replaces_what_was_there(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "stale.json").touch()
    save_tokenizer(train_tokenizer(TEXTS, 300), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]
