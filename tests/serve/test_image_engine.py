"""Prompts with images on vLLM: the answers of transformers' own processors and generate."""

import pytest
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of
from vision_models import FAMILIES

from fft.serve.asked import Reading
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import check_model
from fft.serve.engines.choice import start_engine
from fft.serve.prompts import Renderer
from fft.serve.sampling import Sampling
from fft.serve.window import Question, answers
from fft.text.chat import ImageSettings

QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_own_processors(family, tmp_path):
    model, made = make_vision_model(tmp_path / "model", family), pictures(6)
    for number, data in enumerate(made):
        (tmp_path / f"{number}.png").write_bytes(data)
    forms, meant = prompts_of(made)
    options = EngineOptions("vllm", engine_args=QUICK)
    checked = check_model(str(model), options, images=ImageSettings(str(tmp_path)))
    renderer = Renderer.of(checked.tokenizer, checked.limit, images=checked.images)
    reading, sampling = Reading("prompt", Sampling(), images=True), Sampling(max_new_tokens=12)
    prompts = renderer.render_many([reading.ask(form).prompt for form in forms])
    engine = start_engine(checked)
    try:
        asked = [Question(None, row, prompt, sampling, prompt.images) for row, prompt in enumerate(prompts)]
        found = [one.text for _, (one,) in answers(engine, asked)]
    finally:
        engine.close()
    assert found == answers_of_transformers(model, meant)
