"""What the test templates mean, written down a second time in plain Python: stretches of text, trained on or not."""

import json

import numpy as np

from spark.chat_templates import STYLES

NOT_TRAINED = -100

_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def stretches(style: str, messages: list[dict]) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, whether it is trained on)."""
    chosen, out = STYLES[style], []
    system = messages[0]["role"] == "system"
    if style == "mistral":
        out.append(("<s>", False))
        prompt = messages[0]["content"] + "\n\n" if system else ""
        for message in messages[system:]:
            if message["role"] == "user":
                out.append((f"[INST] {prompt}{message['content']} [/INST]", False))
                prompt = ""
            else:
                out += [(" ", False), (message["content"] + "</s>", True)]
        return out
    if style.startswith("baichuan2"):
        token = {"system": "", "user": "<reserved_106>", "assistant": "<reserved_107>"}
        for message in messages:
            out.append((token[message["role"]], False))
            trained = message["role"] == "assistant"
            out.append((message["content"] + (chosen.end_of_turn if trained else ""), trained))
        return out
    if style == "phi3":
        for message in messages:
            trained = message["role"] == "assistant"
            out += [(f"<|{message['role']}|>\n", False), (message["content"] + "<|end|>", trained), ("\n", False)]
        return [*out, ("<|endoftext|>", False)]
    if style == "phi4":
        for message in messages:
            trained = message["role"] == "assistant"
            out += [(f"<|im_start|>{message['role']}<|im_sep|>", False), (message["content"] + "<|im_end|>", trained)]
        return out
    if style == "terse":
        messages = [message for message in messages if message["content"]]
    if style == "llama3":
        for i, message in enumerate(messages):
            out.append(
                ((chosen.bos if i == 0 else "") + f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False)
            )
            out.append((message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"))
        return out
    if style == "qwen2.5" and not system:
        out.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    if style == "internlm2":
        out.append(("<s>", False))
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for i, message in enumerate(messages):
        trained, content = message["role"] == "assistant", message["content"]
        out.append((f"<|im_start|>{message['role']}\n", False))
        if style == "qwen3" and trained:
            thought = ""
            if "</think>" in content:
                thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                own, content = True, content.split("</think>")[-1].lstrip("\n")
            else:
                own = False
            if i > max(questions, default=-1) and (thought or i + 1 == len(messages)):
                out.append((f"<think>\n{thought}\n</think>\n\n", own))
                content = content.lstrip("\n")
        out += [(content + "<|im_end|>", trained), ("\n", False)]
    return out


def tool_stretches(style: str, messages: list[dict], tools: list[dict]) -> list[tuple[str, bool]]:
    """The same of the templates that render calls; arguments of calls are objects here."""
    if style == "hermes":
        return _hermes(messages, tools)
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    out = [("<s>", False)]
    if style == "deepseek":
        out += [(json.dumps(tool, ensure_ascii=False) + "\n", False) for tool in tools]
    for i, message in enumerate(messages):
        role, content, calls = message["role"], message["content"], message.get("tool_calls", ())
        if style == "deepseek":
            prefix = {"user": "<|User|>", "assistant": "<|Assistant|>", "tool": "<|result|>"}.get(role, "")
            out += [(prefix, False), (content or "", role == "assistant")]
            for call in calls:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                out.append((f"<|call|>function {call['function']['name']}\n```json\n{arguments}\n```", True))
        elif role == "user":
            asked = f"[AVAILABLE_TOOLS]{json.dumps(tools, ensure_ascii=False)}[/AVAILABLE_TOOLS]"
            out += [(asked if tools and i == questions[-1] else "", False), (f"[INST] {content}[/INST]", False)]
        elif role == "tool":
            out.append((f"[TOOL_RESULTS]{content} of {message['tool_call_id']}[/TOOL_RESULTS]", False))
        elif calls:
            made = [json.dumps({**call["function"], "id": call["id"]}, ensure_ascii=False) for call in calls]
            out.append((f"[TOOL_CALLS] [{', '.join(made)}]", True))
        else:
            out += [(" ", False), (content.strip(), True)]
        if role == "assistant":
            out.append(("</s>", True))
    return out


def _hermes(messages: list[dict], tools: list[dict]) -> list[tuple[str, bool]]:
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    head = "" if system is None else system
    if tools:
        head = (f"{head}\n\n" if system is not None else "") + "# Tools" + lines
    out = [(f"<|im_start|>system\n{head}<|im_end|>\n", False)] if tools or system is not None else []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        if role == "user":
            out.append((f"<|im_start|>user\n{content}<|im_end|>\n", False))
        elif role == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            out.append((f"<|im_start|>user\n{text}<|im_end|>\n", False))
        elif role == "assistant":
            out.append(("<|im_start|>assistant\n", False))
            thought = message.get("reasoning_content", "")
            if i > last and (thought or i + 1 == len(messages)):
                out.append((f"<think>\n{thought}\n</think>\n\n", bool(thought)))
            calls = [
                '<tool_call>\n{"name": "'
                + call["function"]["name"]
                + '", "arguments": '
                + json.dumps(call["function"]["arguments"], ensure_ascii=False)
                + "}\n</tool_call>"
                for call in message.get("tool_calls", ())
            ]
            out += [("\n".join([*([content] if content else []), *calls]) + "<|im_end|>", True), ("\n", False)]
    return out


def labels_of(tokenizer, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels of stretches by transformers' own offsets: a token is trained on if it holds a character of a
    stretch that is."""
    text = "".join(part for part, _ in parts)
    flags = np.concatenate([np.full(len(part), trained) for part, trained in parts])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    trained = []
    for i, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if i in added:  # transformers counts the white space that it swallows as a part of it
            a = text.index(added[i], a, b)
            b = a + len(added[i])
        trained.append(bool(flags[a:b].any()))
    ids = encoded["input_ids"]
    return ids, [i if t else NOT_TRAINED for i, t in zip(ids, trained, strict=True)]
