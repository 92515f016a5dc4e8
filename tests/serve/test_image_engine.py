"""Prompts with images on vLLM: the answers of transformers' own processors and generate."""

import pytest
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of
from vision_models import FAMILIES

from fft.images.processor_files import set_limits
from fft.images.rules import ImageLimits
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


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl_moe"])
def test_answers_are_those_of_transformers_own_processors(family, tmp_path):
    """Of one family, with a limit that its directory does not have."""
    model, made = make_vision_model(tmp_path / "model", family), pictures(6)
    limits = ImageLimits(max_pixels=9 * 14**2) if family == "qwen2_vl" else ImageLimits()
    for number, data in enumerate(made):
        (tmp_path / f"{number}.png").write_bytes(data)
    forms, meant = prompts_of(made)
    options = EngineOptions("vllm", engine_args=QUICK)
    checked = check_model(str(model), options, images=ImageSettings(str(tmp_path), limits))
    renderer = Renderer.of(checked.tokenizer, checked.limit, images=checked.images)
    reading, sampling = Reading("prompt", Sampling(), images=True), Sampling(max_new_tokens=12)
    prompts = renderer.render_many([reading.ask(form).prompt for form in forms])
    engine = start_engine(checked)
    try:
        asked = [Question(None, row, prompt, sampling, prompt.images) for row, prompt in enumerate(prompts)]
        found = [one.text for _, (one,) in answers(engine, asked)]
    finally:
        engine.close()
    set_limits(model, checked.images.rules)
    assert found == answers_of_transformers(model, meant)
