"""vLLM's own engine, offline: requests go in as ids, and come back when they are finished.

Answers are made of their ids here, so vLLM turns none into text, but where texts end an answer. Tokens that end one are
told with each request, so that they are those of the other engine, whatever vLLM reads from the model's files.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fft.errors import UserError, one_line
from fft.images.rules import GRIDS, TILES, ImageRules
from fft.serve.engines import Completion, Request
from fft.serve.engines.children import Children, Overheard, true_cause
from fft.serve.engines.texts import decode_answer, first_stop, told_logprobs
from fft.serve.images import stretches_of, values_of

if TYPE_CHECKING:
    from fft.serve.engines.checked import CheckedModel

#: Requests to have unfinished: more than it runs at once, so that its scheduler has a choice; with images fewer, whose
#: pixels are in memory until they are finished.
_WINDOW, _WINDOW_OF_IMAGES = 1024, 64
#: Of a CPU's free memory, what the cache of keys and values takes, and at most so many bytes.
_CACHE_SHARE, _CACHE_BYTES = 1 / 8, 4 << 30
#: Seconds that its processes have to end: on a CPU they take five, and more while there is something to do.
_PATIENCE, _HASTE = 20.0, 2.0
#: Tokens that a CPU computes at once, or a whole prompt.
_BATCHED_TOKENS = 4096
#: Ranks of adapters that vLLM makes room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: What vLLM is told by the environment unless the user says otherwise: warnings alone, on stderr, nothing sent home.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
#: What helps, by a word of what vLLM says.
_REMEDIES = (
    ("cache", "lower --max_model_len, or give it more memory (--gpu_memory_utilization, --engine_args)"),
    ("memory", "free memory, or take less of it with --gpu_memory_utilization or --tensor_parallel_size"),
    ("max_model_len", "lower --max_model_len"),
    ("world size", "lower --tensor_parallel_size to the number of GPUs"),
)


class VllmEngine:
    """See the module. Raises :class:`UserError` when vLLM cannot start, with its cause, and when it dies."""

    name = "vllm"

    def __init__(self, model: "CheckedModel", limit: int) -> None:
        self.limit, self._tokenizer, self._ends, self._images = limit, model.tokenizer, model.ends, model.images
        self.window = _WINDOW if model.images is None else _WINDOW_OF_IMAGES
        self._requests: dict[str, Request] = {}
        self._engine: Any = None
        self._silent = True
        output = self._output = Overheard(shown="VLLM_LOGGING_LEVEL" in os.environ)
        self._children = Children()
        try:
            with _environment(), output:
                self._engine = _start(model, limit)
                self._adapter = self._load_adapter(model.options.lora)
            self._children.settle()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):  # a signal
                raise
            cause = true_cause(error, output.lines)
            remedies = (text for word, text in _REMEDIES if word in cause)
            remedy = next(remedies, "mend that, or use --engine transformers")
            raise UserError(
                f"vLLM cannot start: {cause}: {remedy} (VLLM_LOGGING_LEVEL=INFO shows all it says)."
            ) from error
        self._silent, output.shown = not output.shown, True

    @property
    def _takes_raw(self) -> bool:
        """Whether the model normalizes images itself, as newer ones of vLLM's do."""
        settings = self._engine.model_config.multimodal_config
        return bool(getattr(settings, "mm_device_do_normalize", False))

    def _load_adapter(self, lora: str | None) -> Any:
        if lora is None:
            return None
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, str(Path(lora).resolve()))
        self._engine.add_lora(request)
        return request

    def add(self, request: Request) -> None:
        """See :class:`fft.serve.engines.Engine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._ends)
        parameters = SamplingParams(
            max_tokens=request.room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=request.seed if sampling.temperature > 0 else None,
            stop=list(sampling.stop),
            stop_token_ids=sorted(ends),
            ignore_eos=True,  # it is among the tokens that end an answer
            logprobs=sampling.logprobs,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        name = str(request.number)
        self._requests[name] = request
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(request.ids)}
        if self._images is not None and request.images:
            prompt |= {"type": "multimodal", **_image_fields(request, self._images.rules, self._takes_raw)}
        self._engine.add_request(name, prompt, parameters, lora_request=self._adapter)

    def step(self) -> list[tuple[int, Completion]]:
        """See :class:`fft.serve.engines.Engine`. Raises :class:`UserError` when a process of vLLM has ended."""
        if not self._requests:
            return []
        try:
            outputs = self._engine.step()
        except Exception as error:
            if type(error).__name__ != "EngineDeadError":
                raise
            raise UserError(
                f"vLLM has ended while it generated ({one_line(error)}; its log above says why): what is finished is "
                "kept, run again to go on."
            ) from error
        return [self._answer(output) for output in outputs if output.finished]

    def _answer(self, output: Any) -> tuple[int, Completion]:
        request = self._requests.pop(output.request_id)
        (one,) = output.outputs
        if one.finish_reason not in ("stop", "length"):
            raise UserError(f"vLLM did not finish a request ({one.finish_reason}): run again to go on.")
        ids, sampling = list(one.token_ids), request.sampling
        by_token = one.finish_reason == "stop" and not isinstance(one.stop_reason, str)
        kept = ids[:-1] if by_token else ids
        text = decode_answer(self._tokenizer, request.ids, kept)
        at = first_stop(text, sampling.stop)
        told = None
        if sampling.logprobs is not None:
            steps = [[(token, known.logprob) for token, known in step.items()] for step in one.logprobs[: len(kept)]]
            told = told_logprobs(self._tokenizer, kept, steps, sampling.logprobs)
        return request.number, Completion(text if at is None else text[:at], len(kept), one.finish_reason, told)

    def close(self) -> None:
        """Have vLLM end its processes, and end those that it leaves."""
        engine, self._engine = self._engine, None
        patience = _HASTE if self._requests else _PATIENCE
        self._output.shown = self._output.shown and not self._silent  # how its processes end is told to nobody
        self._requests.clear()
        if engine is not None:
            if self._silent:  # nor that some have to be killed
                logging.getLogger("vllm").setLevel(logging.ERROR)
            with contextlib.suppress(Exception):  # of an engine that is dead already
                engine.engine_core.shutdown(timeout=patience)
        self._children.end(patience if engine is not None else 0.0)  # what has not started ends at once


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Have vLLM, and the processes that it starts, find ours where the user says nothing; others do not."""
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _start(model: "CheckedModel", limit: int) -> Any:
    """vLLM's engine of a model directory."""
    from vllm import LLM
    from vllm.platforms import current_platform

    options = model.options
    given: dict[str, Any] = {
        "model": model.directory,
        "dtype": options.dtype,
        "max_model_len": limit,
        "tensor_parallel_size": options.tensor_parallel_size,
        "trust_remote_code": False,
    }
    if options.gpu_memory_utilization is not None:
        given["gpu_memory_utilization"] = options.gpu_memory_utilization
    if current_platform.is_cpu():
        given["dtype"] = "float32" if options.dtype == "auto" else options.dtype
        given |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batched_tokens(limit)}
        if options.gpu_memory_utilization is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            given["kv_cache_memory_bytes"] = cache_bytes()
    if not model.config.tie_word_embeddings:  # a head of its own would be dropped where the config ties it
        given["hf_overrides"] = {"tie_word_embeddings": False}
    if options.lora is not None:
        from fft.checkpoint.adapter import adapts_tower

        given |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_room(options.lora)}
        if adapts_tower(Path(options.lora)):  # which vLLM leaves out where it is not told
            given["enable_tower_connector_lora"] = True
    return LLM(**given | image_limits(model, limit) | dict(options.engine_args)).llm_engine


def image_limits(model: "CheckedModel", limit: int) -> dict[str, Any]:
    """What vLLM is told of images, for which it makes room: none, or such as there may be in a prompt of ``limit``
    tokens. Empty for a model of texts."""
    if model.config.model_type not in (*GRIDS, *TILES):
        return {}
    if model.images is None:
        return {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    rules = model.images.rules
    if rules.family in GRIDS:
        most = min(rules.max_pixels, max(rules.min_pixels, limit * rules.factor**2))
        size: dict[str, Any] = {"size": {"shortest_edge": rules.min_pixels, "longest_edge": most}}
    else:
        size = {"crop_to_patches": True, "min_patches": rules.min_tiles, "max_patches": rules.max_tiles}
    return {"limit_mm_per_prompt": {"video": 0}, "mm_processor_kwargs": size}


def _image_fields(request: Request, rules: ImageRules, raw: bool) -> dict[str, Any]:
    """What vLLM's own processor would make of a request's images, ``raw`` where the model normalizes them itself; by
    the pixels of training, from which those of its image processors differ a little."""
    import torch
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    values = {name: torch.from_numpy(value) for name, value in values_of(request.images, rules, raw).items()}
    grids = torch.tensor([image.grid for image in request.images])
    if rules.family in GRIDS:
        sizes = grids.prod(-1)
        kinds = {"image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}
    else:
        sizes = grids[:, 0]
        values |= {"image_num_patches": sizes, "image_token_id": torch.tensor(rules.image_token)}
        kinds = {
            "image_num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_token_id": MultiModalFieldConfig.shared("image", len(grids), keep_on_cpu=True),
        }
    kinds["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", sizes)
    places = [PlaceholderRange(at, count) for at, count in stretches_of(request.ids, request.images, rules)]
    names = [blake2b(image.data + repr(image.grid).encode(), digest_size=32).hexdigest() for image in request.images]
    return {
        "mm_kwargs": MultiModalKwargsItems.from_hf_inputs(BatchFeature(values), kinds),
        "mm_hashes": {"image": names},
        "mm_placeholders": {"image": places},
    }


def batched_tokens(limit: int) -> int:
    """How many tokens a CPU may compute at once, so that prompts are read whole; they and answers have ``limit``.

    A seeded request whose prompt is read in pieces ends vLLM there: "CPU Generator does not use offset".
    """
    return max(limit, _BATCHED_TOKENS)


def cache_bytes() -> int:
    """What the cache of keys and values gets of a CPU's memory; vLLM's own share is more than a busy machine has."""
    import psutil

    return int(min(psutil.virtual_memory().available * _CACHE_SHARE, _CACHE_BYTES))


def adapter_room(lora: str) -> int:
    """The rank that vLLM has to make room for. Raises :class:`UserError` for one that it has none for, and for DoRA."""
    from fft.checkpoint import adapter

    config = adapter.read_config(Path(lora))
    rank = config.get("r")
    if config.get("use_dora"):
        raise UserError(
            f"--lora {lora}: vLLM has no DoRA (use_dora): merge it by python -m fft.checkpoint.convert MODEL OUT "
            f"--lora {lora}."
        )
    rooms = [room for room in _RANKS if isinstance(rank, int) and 0 < rank <= room]
    if not rooms:
        raise UserError(f"--lora {lora}: vLLM takes no rank of {rank}, but up to {_RANKS[-1]}: merge the adapter.")
    return rooms[0]
