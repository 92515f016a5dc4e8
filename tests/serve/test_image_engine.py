"""Prompts with images on vLLM: the answers of transformers' own processors and generate."""

import pytest
import torch
from thorough import thorough
from transformers import AutoModelForImageTextToText
from vision_generation import answers_of_transformers, make_vision_model, pictures, prompts_of

from fft.checkpoint.adapter import adapter_config, adapter_parameters, write_adapter
from fft.checkpoint.conversion import convert, merged
from fft.images.processor_files import set_limits
from fft.images.rules import ImageLimits, ImageSettings
from fft.models.lora import Lora, adapt, adapted, reset_adapters
from fft.models.vision import decoder_path, vision_parts
from fft.serve.asked import Reading
from fft.serve.engines import EngineOptions
from fft.serve.engines.checked import check_model
from fft.serve.engines.choice import start_engine
from fft.serve.prompts import Renderer
from fft.serve.sampling import Sampling
from fft.serve.window import Question, answers
from fft.weights.hf import WeightReader, write_shard

QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize(
    "family",
    [
        *("qwen2_vl", "internvl", "qwen3_vl-adapter"),
        *(thorough(name) for name in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")),
    ],
)
def test_answers_are_those_of_transformers_own_processors(family, tmp_path):
    """Of one family, with a limit that its directory does not have; with an adapter, also of the tower."""
    family, _, has_adapter = family.partition("-")
    model, made = make_vision_model(tmp_path / "model", family), pictures(6)
    whole, lora = with_adapter(model, tmp_path) if has_adapter else (model, None)
    limits = ImageLimits(max_pixels=9 * 14**2) if family == "qwen2_vl" else ImageLimits()
    for number, data in enumerate(made):
        (tmp_path / f"{number}.png").write_bytes(data)
    forms, meant = prompts_of(made)
    options = EngineOptions("vllm", lora=lora, engine_args=QUICK)
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
    set_limits(whole, checked.images.rules)
    assert found == answers_of_transformers(whole, meant)
    if has_adapter:
        assert found != answers_of_transformers(model, meant)


def with_adapter(model, folder):
    """The directory of a model with a random adapter of decoder and tower merged, and the adapter's."""
    made = AutoModelForImageTextToText.from_pretrained(model)
    lora, output = Lora(8, 16, ("q_proj", "visual.qkv", "visual.linear_fc2")), folder / "adapter"
    adapt(made, f"{decoder_path(made)}.layers", lora, vision_parts(made))
    reset_adapters(made, seed=1)
    for name, matrix in (parameters := adapter_parameters(dict(made.named_parameters()))).items():
        if "lora_B" in name:
            torch.nn.init.normal_(matrix, std=0.3)
    output.mkdir()
    write_shard(output, parameters, 0, 1)
    write_adapter(output, 1, adapter_config(lora, model, adapted(made)))
    convert(merged(WeightReader(model), output, None, model), model, str(folder / "whole"), None, 1 << 30)
    return folder / "whole", str(output)
