"""Files of requests as OpenAI's batch API takes them, and their answers in its form.

A request is ``{"custom_id": .., "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [..]}}``. What of
a body would change the answer and is not known here is refused by name.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fft.errors import UserError
from fft.serve.engines import Completion
from fft.serve.sampling import Sampling, sampling_of
from fft.text.records import Malformed

_URL = "/v1/chat/completions"
#: Keys of a body that are settings of :class:`Sampling` under the same name: OpenAI's, and those that vLLM adds.
_SAMPLING = ("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")
_SAMPLING += ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos")
#: Keys that are read in another way, and those that change nothing of an answer.
_READ = ("messages", "model", "max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs", "stream")
_IDLE = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


def is_request(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of such a file."""
    return "custom_id" in record and isinstance(record.get("body"), dict)


def read_request(record: Mapping[str, Any], sampling: Sampling) -> tuple[list[Any], Sampling]:
    """The turns of a request, and its sampling; ``sampling`` where it says nothing. Raises :class:`Malformed`."""
    body = {name: value for name, value in record["body"].items() if value is not None}
    if record.get("url", _URL) != _URL:
        raise Malformed(f"url {record['url']!r} is not answered here, only {_URL}")
    unknown = [name for name in body if name not in (*_SAMPLING, *_READ, *_IDLE)]
    if unknown:
        raise Malformed(f"key {unknown[0]} of the body is not supported: leave it out")
    if body.get("stream"):
        raise Malformed("stream is for servers, not for files: leave it out")
    if not isinstance(body.get("messages"), list):
        raise Malformed("the body has no list of messages")
    given = {**vars(sampling), **{name: body[name] for name in _SAMPLING if name in body}}
    given["max_new_tokens"] = body.get("max_completion_tokens", body.get("max_tokens", sampling.max_new_tokens))
    if "stop" in body:
        given["stop"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    if "logprobs" in body:
        given["logprobs"] = body.get("top_logprobs", 0) if body["logprobs"] else None
    try:
        return body["messages"], sampling_of(given)
    except UserError as error:
        raise Malformed(str(error).rstrip(".").replace("`", "")) from error
    except TypeError as error:
        raise Malformed(f"a setting of the body is of another type than it must be ({error})") from error


def answer_request(
    record: Mapping[str, Any], row: int, prompt_tokens: int, completions: Sequence[Completion]
) -> dict[str, Any]:
    """The answer to a request, as a line of the API's output file has it; ``row`` makes ids unique."""
    written = sum(one.tokens for one in completions)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
    body = {
        "id": f"chatcmpl-{row}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": record["body"].get("model"),
        "choices": [_choice(index, one) for index, one in enumerate(completions)],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"request-{row}", "body": body}
    return {"id": f"batch_req_{row}", "custom_id": record["custom_id"], "response": response, "error": None}


def refuse_request(record: Mapping[str, Any], row: int, reason: str) -> dict[str, Any]:
    """The line of a request that has no answer, and why."""
    error = {"code": "invalid_request", "message": reason}
    return {"id": f"batch_req_{row}", "custom_id": record["custom_id"], "response": None, "error": error}


def _choice(index: int, one: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": one.text}
    told = None if one.logprobs is None else {"content": [_logprob(entry) for entry in one.logprobs]}
    return {"index": index, "message": message, "logprobs": told, "finish_reason": one.finish_reason}


def _logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    own = {"token": entry["token"], "logprob": entry["logprob"], "bytes": [*entry["token"].encode()]}
    if "top_logprobs" in entry:
        own["top_logprobs"] = [_logprob(other) for other in entry["top_logprobs"]]
    return own
