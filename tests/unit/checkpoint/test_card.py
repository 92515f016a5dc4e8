"""The card says what a checkpoint's state says; the Hub's own reader takes its header, for models and adapters."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from fft.checkpoint.card import CARD, card_beside, card_of
from fft.train_arguments import TrainArguments

TABLES = [
    {
        "use": "train",
        "table": "s3://lake/web pages",
        "version": 7,
        "fingerprint": "f1",
        "rows": 1000,
        "tokens": 2048000,
    },
    {"use": "train", "table": "lake/chats", "version": None, "fingerprint": "f2", "rows": 10, "tokens": 77},
    {"use": "eval", "table": "lake/held|out", "version": None, "fingerprint": "f3", "rows": 5, "tokens": 50},
]


def state_of(**changed):
    args = TrainArguments(train_data="s3://lake/web", seq_len=512, learning_rate=3e-3, **changed)
    return {
        **{"step": 200, "eval_loss": 2.0, "global_batch": 4, "arguments": dataclasses.asdict(args), "tables": TABLES},
        **{"layout": {"data": 2, "pipe": 2}, "versions": {"torch": "2.13.0"}, "images": False},
        "progress": {
            "step": 200,
            "loss": 1.5,
            "best": [150, 1.75],
            "last": [200, 2.0],
            "tokens": 4e5,
            "seconds": 100.0,
        },
    }


def read(folder, text):
    (folder / CARD).write_text(text)
    return ModelCard.load(folder / CARD)


def test_a_model_from_scratch(tmp_path):
    card = read(tmp_path, card_of(state_of(init=True, model="config.json"), "llama"))
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["flash-fine-tuning", "llama"]
    assert card.data.datasets == ["web-pages", "chats"]
    assert card.data.base_model is None
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 2.0, "perplexity": pytest.approx(7.389, abs=1e-3)}
    for line in (
        "| began with | random weights, seed 0 |",
        "| steps | 200 of 2,048 tokens each, 409,600 in all |",
        "| training loss | 1.5000 |",
        "| validation loss | 2.0000 (perplexity 7.389) |",
        "| lowest validation loss | 1.7500 at step 150 |",
        "| time of its steps | 100 s, 4,000 tokens/s |",
        "| layout | data 2 x pipe 2 |",
        "| train | s3://lake/web pages | 7 | f1 | 1,000 | 2,048,000 |",
        "| eval | lake/held\\|out |  | f3 | 5 | 50 |",
        "| --learning_rate | 0.003 |",
        'AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")',
    ):
        assert line in card.text, card.text


def test_an_adapter_and_the_model_that_it_is_merged_into(tmp_path):
    base = tmp_path / "Qwen3-8B"
    base.mkdir()
    (base / CARD).write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\nthumbnail: x.png\n---\n# Qwen3\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    card = read(adapter, card_of(state_of(model=str(base), lora_dim=8), "qwen3"))
    assert (card.data.library_name, card.data.base_model) == ("peft", "Qwen3-8B")
    assert (card.data.base_model_relation, card.data.tags) == ("adapter", ["flash-fine-tuning", "qwen3", "lora"])
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "de"])
    assert "thumbnail" not in card.data.to_dict()
    assert "# adapter of rank 8 for a qwen3, trained to step 200" in card.text
    assert f"python -m fft.checkpoint.convert {base} MERGED --lora DIR" in card.text
    merged = card_beside(adapter)
    (tmp_path / "merged").mkdir()
    card = read(tmp_path / "merged", merged)
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert card.data.tags == ["flash-fine-tuning", "qwen3", "merged"]
    assert "# merged adapter of rank 8" in card.text
    assert card.text.count("## Load") == card.text.count("## Go on") == 1
    assert "Peft" not in card.text
    assert card_beside(tmp_path / "merged") == merged


def test_what_a_state_of_an_older_release_does_not_say_the_card_does_not_say(tmp_path):
    card = read(tmp_path, card_of({"step": 3, "eval_loss": None}, "llama"))
    assert card.data.eval_results is None
    assert "## Data" not in card.text
    assert "loss" not in card.text


def test_a_base_of_the_hubs_cache_has_its_name_there(tmp_path):
    base = "/cache/hub/models--Qwen--Qwen3-8B/snapshots/0123abc"
    assert read(tmp_path, card_of(state_of(model=base), "qwen3")).data.base_model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("text", [None, "# mine", "---\ntags: [x]\n---\n# mine", "---\n[: \n---\n", "---\n- a\n---\n"])
def test_cards_of_others_are_left_alone(tmp_path, text):
    if text is not None:
        (tmp_path / CARD).write_text(text)
    assert card_beside(tmp_path) is None
