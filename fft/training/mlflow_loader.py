"""What goes with every model that is registered with MLflow: it loads it by transformers, and needs nothing of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: What a request may say: name, default, and the type as MLflow calls it. A temperature of 0 takes the likeliest token;
#: ``chat`` makes a user's message of the prompt, as the model's template writes it.
PARAMETERS = (("max_new_tokens", 64, "long"), ("temperature", 0.0, "double"), ("chat", False, "boolean"))


class Writer:
    """Continues prompts, one at a time."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        adapter, source = directory / "adapter_config.json", directory
        if adapter.is_file() and not (directory / "tokenizer_config.json").is_file():
            source = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype="auto", trust_remote_code=False)
        self._model = model.to(device).eval()

    def predict(self, prompts: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """A text each for prompts: of a frame its column ``prompt``, of a list its texts."""
        given = {name: default for name, default, _ in PARAMETERS} | dict(params or {})
        texts = prompts["prompt"].tolist() if hasattr(prompts, "columns") else list(prompts)
        return [self._write(text["prompt"] if isinstance(text, Mapping) else text, given) for text in texts]

    def _write(self, prompt: str, given: Mapping[str, Any]) -> str:
        if given["chat"]:
            messages = [{"role": "user", "content": prompt}]
            inputs = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self._tokenizer(prompt, return_tensors="pt")
        inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        chosen = {"do_sample": True, "temperature": given["temperature"]} if given["temperature"] else {}
        written = self._model.generate(
            **inputs, max_new_tokens=int(given["max_new_tokens"]), **(chosen or {"do_sample": False})
        )
        answer = written[0, inputs["input_ids"].shape[1] :].tolist()
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))


def _load_pyfunc(path: str) -> Writer:
    """What MLflow calls with the folder of the model."""
    return Writer(Path(path))
