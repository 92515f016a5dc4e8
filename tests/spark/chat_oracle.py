"""What the test templates mean, written down a second time in plain Python: stretches of text, trained on or not."""

from spark.chat_templates import STYLES

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
