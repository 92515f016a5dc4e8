"""What goes with a registered model: it answers as transformers and PEFT do, with a model and with an adapter."""

import json

import pandas as pd
import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.training.mlflow_loader import Writer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    save_tokenizer(train_tokenizer(["def f(x):\n    return x\n"] * 3, 300), folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(SMALL | {"model_type": "llama", "vocab_size": 300}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}return"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def continued(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


def test_a_model_and_an_adapter_that_has_no_tokenizer(base):
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    prompts = ["def f(", "return"]
    expected = [continued(model, tokenizer, prompt) for prompt in prompts]
    own, settings = Writer(base), {"max_new_tokens": 6}
    assert own.predict(pd.DataFrame({"prompt": prompts}), settings) == expected
    assert own.predict([{"prompt": prompt} for prompt in prompts], settings) == expected
    as_chat = continued(model, tokenizer, "user: def f(\nreturn")
    assert own.predict(["def f("], settings | {"chat": True}) == [as_chat]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(base.parent / "adapter")
    expected = [continued(adapted, tokenizer, prompt) for prompt in prompts]
    assert Writer(base.parent / "adapter").predict(prompts, settings) == expected
    assert expected != own.predict(prompts, settings)
