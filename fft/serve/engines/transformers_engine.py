"""``generate`` of transformers, where there is no vLLM: a batch at a time, the same answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fft.errors import UserError, one_line
from fft.serve.engines import Completion, Request
from fft.serve.engines.scores import Choice, Ends
from fft.serve.engines.texts import decode_answer, first_stop, told_logprobs
from fft.serve.images import values_of

if TYPE_CHECKING:
    import torch

    from fft.serve.engines.checked import CheckedModel


class TransformersEngine:
    """Batches of requests with the same sampling, padded on the left; each is finished as a whole.

    Nothing of ``generation_config.json`` counts but the tokens that end a text. Raises :class:`UserError` for weights
    that transformers cannot load, or that are NaN.
    """

    name = "transformers"

    def __init__(self, model: "CheckedModel", limit: int) -> None:
        import torch
        from transformers import GenerationConfig

        self.limit, self._tokenizer, self._ends, self._images = limit, model.tokenizer, model.ends, model.images
        self.window = self._batch_size = model.options.batch_size
        self._waiting: list[Request] = []
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        # Few CPUs compute bf16 faster than fp32, and rounding would make a batch differ from its prompts alone.
        auto = torch.float32 if device.type == "cpu" else "auto"
        kind = auto if model.options.dtype == "auto" else getattr(torch, model.options.dtype)
        self._model = _load_model(model, kind).to(device).eval()
        self._model.generation_config = GenerationConfig()  # the model's habits would count where nothing is said

    def add(self, request: Request) -> None:
        """See :class:`fft.serve.engines.Engine`."""
        self._waiting.append(request)

    def step(self) -> list[tuple[int, Completion]]:
        """Answer a batch: the first request that waits, and others of its sampling."""
        if not self._waiting:
            return []
        sampling = self._waiting[0].sampling
        batch = [request for request in self._waiting if request.sampling == sampling][: self._batch_size]
        taken = {request.number for request in batch}
        self._waiting = [request for request in self._waiting if request.number not in taken]
        return [(r.number, c) for r, c in zip(batch, self._answer(batch), strict=True)]

    def close(self) -> None:
        """Forget what waits, and the model."""
        self._waiting, self._model = [], None

    def _answer(self, batch: Sequence[Request]) -> list[Completion]:
        import torch
        from transformers import GenerationConfig

        # Padding is masked, so any token will do.
        width, pad = max(len(request.ids) for request in batch), next(iter(sorted(self._ends)), 0)
        ids = torch.tensor([[pad] * (width - len(request.ids)) + list(request.ids) for request in batch])
        mask = torch.tensor([[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in batch])
        device = self._model.device
        choice = Choice(batch, width, self._model.config.get_text_config().vocab_size, device)
        ends = Ends(batch, width, self._ends, self._tokenizer, choice.record)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                **self._image_values(batch, ids, mask),
                generation_config=GenerationConfig(
                    max_new_tokens=max(request.room for request in batch), pad_token_id=pad, do_sample=False
                ),
                logits_processor=[choice],
                stopping_criteria=[ends],
            )
        rows = output[:, width:].tolist()
        return [self._completion(request, rows[i], ends.found[i], choice.steps[i]) for i, request in enumerate(batch)]

    def _image_values(self, batch: Sequence[Request], ids: "torch.Tensor", mask: "torch.Tensor") -> dict[str, Any]:
        """What the model takes of a batch's images beside ids; nothing where there are none."""
        import torch

        images = [image for request in batch for image in request.images]
        if self._images is None or not images:
            return {}
        rules = self._images.rules
        values: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values_of(images, rules).items()}
        if "image_grid_thw" in values:  # by which its tokens have their positions
            values["mm_token_type_ids"] = ((ids == rules.image_token) & (mask == 1)).int()
        return {name: value.to(self._model.device) for name, value in values.items()}

    def _completion(
        self, request: Request, ids: list[int], end: tuple[int, str], steps: Sequence[Sequence[tuple[int, float]]]
    ) -> Completion:
        """Of ids, those before the ``end`` that was found, and why it ended there."""
        length, reason = end
        kept = ids[:length]
        text = decode_answer(self._tokenizer, request.ids, kept)
        at = first_stop(text, request.sampling.stop)
        logprobs = request.sampling.logprobs
        told = None if logprobs is None else told_logprobs(self._tokenizer, kept, steps[:length], logprobs)
        return Completion(text if at is None else text[:at], length, reason, told)


def _load_model(checked: "CheckedModel", dtype: "torch.dtype | str") -> Any:
    """The model, of whole and finite weights; what types say of its ``to`` and ``generate`` is not so."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from fft.weights.hf import is_finite

    directory, weights = checked.directory, checked.read
    given: dict[str, Any] = {"pretrained_model_name_or_path": directory}
    if weights is not None:  # read here: multiplied out, or with an adapter added
        given = {
            "pretrained_model_name_or_path": None,
            "state_dict": {name: weights.tensor(name) for name in weights.names},
        }
    try:
        own = type(checked.config)
        mapping = (
            MODEL_FOR_CAUSAL_LM_MAPPING if own in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        )
        kind: Any = mapping[own]
        model, info = kind.from_pretrained(
            **given, config=checked.config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # files that are cut, shapes that differ, packages that a model needs
        raise UserError(f"--model {directory} cannot be loaded ({one_line(error)[:300]}).") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise UserError(
                f"--model {directory}: {fault.replace('_', ' ')} {', '.join(map(str, sorted(info[fault])[:3]))}: its "
                "config.json and weights do not belong together."
            )
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise UserError(f"--model {directory}: {name} holds values that are NaN or infinite: fetch it again.")
    return model
