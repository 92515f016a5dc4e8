"""Small tokenizers with chat templates in the style of well-known model families."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: Trims every content; the header ends with two newlines.
_LLAMA3 = """\
{%- for message in messages %}
    {%- set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {%- set text = text + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{% set text = bos_token + text %}{% endif %}
    {{- text }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

#: Puts a system turn first when there is none.
_QWEN25 = (
    """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""
    + _CHATML
)

#: Drops the reasoning of turns before the last question, and gives the last turn an empty one if it has none.
_QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- set content = message.content %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: The end token stands right after the content; the system prompt goes into the first question; roles must alternate.
_MISTRAL = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

_INTERNLM2 = "{{- bos_token }}\n" + _CHATML

#: Roles are tokens of their own.
_BAICHUAN2 = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- message['content'] }}
    {%- elif message['role'] == 'user' %}{{- '<reserved_106>' + message['content'] }}
    {%- else %}{{- '<reserved_107>' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<reserved_107>' }}{%- endif %}"""

#: The same as some publish it: nothing ends an assistant's turn.
_BAICHUAN2_BARE = _BAICHUAN2.replace(" + eos_token", "")

#: A header is one token, which swallows the white space behind it; the whole ends with another end token.
_PHI3 = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

#: The token behind the role stands right before the content, the end token right behind it.
_PHI4 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

#: Writes nothing of an empty turn, and renders tools.
_TERSE = """\
{%- if tools %}{{- '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{% if message['content'] %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Style:
    """A family's template and special tokens. ``trims`` and ``alternates`` say what the template does and wants,
    ``drops_empty`` that it leaves out empty turns, ``rstrip`` and ``lstrip`` that its special tokens swallow white
    space behind and before them.
    """

    template: str
    special: tuple[str, ...]
    end_of_turn: str
    bos: str | None = None
    eos: str | None = None
    trims: bool = False
    alternates: bool = False
    drops_empty: bool = False
    rstrip: bool = False
    lstrip: bool = False


STYLES = {
    "llama3": Style(
        _LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trims=True,
    ),
    "qwen2.5": Style(_QWEN25, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>"),
    "qwen3": Style(_QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>"),
    "mistral": Style(_MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", bos="<s>", eos="</s>", alternates=True),
    "internlm2": Style(_INTERNLM2, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", bos="<s>", eos="</s>"),
    "baichuan2": Style(_BAICHUAN2, ("<s>", "</s>", "<reserved_106>", "<reserved_107>"), "</s>", eos="</s>"),
    "baichuan2-bare": Style(_BAICHUAN2_BARE, ("<s>", "</s>", "<reserved_106>", "<reserved_107>"), "", eos="</s>"),
    "phi3": Style(
        _PHI3,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<|endoftext|>",
        rstrip=True,
    ),
    "phi4": Style(
        _PHI4,
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|im_end|>",
        eos="<|im_end|>",
        rstrip=True,
        lstrip=True,
    ),
    "terse": Style(_TERSE, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>", drops_empty=True),
}

#: In the style of Qwen3's: calls between tags after the content, results as a user's, reasoning dropped, roles that it
#: does not know dropped.
_HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- '# Tools' }}{% for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: In the style of Mistral's: tools before the last question, calls with ids of nine characters and no text beside them.
_MISTRAL_TOOLS = """\
{{- bos_token }}
{%- set ns = namespace(last=-1, index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.role == 'user' or (message.role == 'assistant' and message.tool_calls is undefined) %}
        {%- if (message.role == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('must alternate') }}{% endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception('ids have 9') }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + ' of ' + message.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('only user, assistant and tool') }}
    {%- endif %}
{%- endfor %}"""

#: In the style of DeepSeek's: arguments are texts, and only a turn without a content has calls.
_DEEPSEEK = """\
{{- bos_token }}{% for tool in tools or [] %}{{- tool | tojson + '\\n' }}{% endfor %}
{%- for message in messages %}
    {%- if message['role'] in ['system', 'developer'] %}{{- message['content'] }}
    {%- elif message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'tool' %}{{- '<|result|>' + message['content'] }}
    {%- elif message['tool_calls'] and not message['content'] %}
        {{- '<|Assistant|>' }}
        {%- for call in message['tool_calls'] %}
            {{- '<|call|>' + call['type'] + ' ' + call['function']['name'] + '\\n```json\\n' }}
            {{- call['function']['arguments'] + '\\n```' }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}{{- '<|Assistant|>' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}"""

#: Those that render calls of tools.
TOOL_STYLES = {
    "hermes": Style(_HERMES, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>"),
    "mistral-tools": Style(
        _MISTRAL_TOOLS, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), "</s>", bos="<s>", eos="</s>"
    ),
    "deepseek": Style(
        _DEEPSEEK, ("<s>", "</s>", "<|User|>", "<|Assistant|>", "<|call|>", "<|result|>"), "</s>", bos="<s>", eos="</s>"
    ),
}

_LINES = [
    "What is the capital of France? The capital of France is Paris, as you know.",
    "assistant\nuser\nsystem\nHello there, how are you today? I am well, thank you.",
    "<think>\nLet me see.\n</think>\n\nThe answer is 42.\n\n  def f(x):\n      return x",
]


def save_chat_tokenizer(folder: Path, style: str, kind: str = "byte-level") -> Path:
    """A small tokenizer with the style's template: "byte-level" BPE, with "nfc" normalization, or "sentence-piece"."""
    from transformers import PreTrainedTokenizerFast

    chosen = (STYLES | TOOL_STYLES)[style]
    if kind == "sentence-piece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[f"<0x{i:02X}>" for i in range(256)], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "nfc":
            tokenizer.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    tokenizer.train_from_iterator(_LINES * 3, trainer)
    if kind == "sentence-piece":  # bytes are pieces of the vocabulary, no added tokens
        tokenizer = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
    strips = {"rstrip": chosen.rstrip, "lstrip": chosen.lstrip}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chosen.bos,
        eos_token=chosen.eos and AddedToken(chosen.eos, special=True, **strips),
        additional_special_tokens=[AddedToken(t, special=True, **strips) for t in chosen.special],
    )
    fast.chat_template = chosen.template
    fast.save_pretrained(folder)
    return folder
