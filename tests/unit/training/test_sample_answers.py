"""Prompts that a run answers: read or refused by line, laid in rows that are those of the run."""

import json

import numpy as np
import pytest
from spark.chat_templates import save_chat_tokenizer

from fft.data.batches import BatchPlan
from fft.data.table import IGNORE
from fft.errors import UserError
from fft.text.chat_template import load_chat_template
from fft.text.encoder import load_tokenizer
from fft.training.sample_answers import AskedSample, answer_ends, prompt_rows, read_prompts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen2.5", "qwen2.5"))


def test_prompts_are_rendered_as_transformers_does(tokenizer, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One and one?"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'Who?'})}\n\n{json.dumps({'messages': turns})}\n")
    template = load_chat_template(tokenizer, "it")
    first, second = read_prompts(str(file), tokenizer, template, 100)
    asked = [{"role": "user", "content": "Who?"}]
    for sample, given, messages in ((first, "Who?", asked), (second, turns, turns)):
        assert sample.given == given
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert sample.ids == whole["input_ids"]
    file.write_text(json.dumps({"prompt": "Who?"}))
    (plain,) = read_prompts(str(file), tokenizer, None, 100)
    assert plain.ids == tokenizer("Who?").input_ids
    ends = answer_ends(tokenizer, template, [3, 4])
    assert ends == {3, 4, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "a " * 200}, "line 1: it has .* tokens, and may have 96"),
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, "line 1: it ends with an answer"),
        ({"text": "a"}, "line 1: no key messages"),
        ("a", "line 1: not a list of turns but str"),
        ({"prompt": "half \udcff"}, "line 1: a lone surrogate"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(record, why, tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=why):
        read_prompts(str(file), tokenizer, load_chat_template(tokenizer, "it"), 96)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty: give a JSON object"):
        read_prompts(str(tmp_path / "empty.jsonl"), tokenizer, None, 96)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.jsonl"), tokenizer, None, 96)


@pytest.mark.parametrize("multiple", [None, 4])
def test_rows_have_the_size_of_the_run_and_every_prompt_once(multiple):
    """Five prompts with room for answers of 4, in samples of 16, two a micro-batch."""
    samples = [AskedSample(n, [n + 10] * (n + 3)) for n in range(5)]
    samples[1].answer = [7, 8]
    rows = prompt_rows(samples, 4, 16, BatchPlan(1, 0, 1, 2, multiple))
    assert len(rows) == 2
    seen = {}
    for row in rows:
        tokens = row.input_ids.shape[1]
        assert tokens == 32 if multiple is None else tokens % 4 == 0
        assert row.cu_seqlens.shape == (tokens + 1,)
        places = np.flatnonzero(row.labels != IGNORE)
        assert row.trained == len(places)
        bounds = np.unique(row.cu_seqlens).tolist()
        for place in places.tolist():
            begin = max(bound for bound in bounds if bound <= place)
            assert place + 1 in bounds
            seen[int(row.labels[place])] = row.input_ids[0, begin : place + 1].tolist()
    assert seen == {n: [*sample.ids, *sample.answer] for n, sample in enumerate(samples)}
