"""Tokenizers that come with code of their own, as a ``tokenizer.json`` that needs none: Qwen, Baichuan, InternLM2.

python -m fft.text.convert_tokenizer Qwen-7B-Chat OUT         # qwen.tiktoken
python -m fft.text.convert_tokenizer Baichuan2-13B-Chat OUT   # tokenizer.model, of SentencePiece
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fft.console import say
from fft.data.model_files import check_directory
from fft.data.owner import atomic_folder
from fft.data.replaceable import MODEL, check_replaceable
from fft.errors import Parser, UserError, one_line, run_cli
from fft.files import write_file
from fft.json_text import json_value
from fft.text.byte_ranks import ranked_tokenizer, read_ranks
from fft.text.piece_model import NORMAL, PieceModel, read_piece_model

#: The command, as sentences name it.
COMMAND = "python -m fft.text.convert_tokenizer"
#: What is written; ``tokenizer_config.json`` last.
_JSON, _TEMPLATE, _CONFIG = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
#: Files of special tokens, beside ``tokenizer_config.json``, and of templates.
_MAP, _ADDED, _GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
_CHATML = (
    f"{{% for message in messages %}}{_TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML
)
_INTERNLM2_TEMPLATE = "{{ bos_token }}" + _CHATML
#: As published: what stands before a question and before an answer, which ends with </s>.
_BAICHUAN_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{{{{ '{user}' + message['content'] }}}}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ '{assistant}' + message['content'] + eos_token }}}}"
    "{{% elif message['role'] == 'system' and loop.first %}}{{{{ message['content'] }}}}"
    "{{% else %}}{{{{ raise_exception('a system message must be the first, and roles user and assistant') }}}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
)
_BAICHUAN_ROLES = (("user_token_id", 195), ("assistant_token_id", 196))


@dataclass(frozen=True)
class Converted:
    """A tokenizer as files have it: ``tokenizer.json``, ``tokenizer_config.json``, and the chat template, if any."""

    spec: dict
    config: dict
    template: str | None

    def write(self, folder: Path) -> list[str]:
        """Write the files into a folder that exists; returns their names."""
        files = {_JSON: _text(self.spec), _CONFIG: _text(self.config, indent=2)}
        if self.template is not None:
            files[_TEMPLATE] = self.template
        for name, text in files.items():
            write_file(folder / name, text)
        return list(files)


def is_original(directory: Path) -> bool:
    """Whether a folder's tokenizer is one that :func:`convert_tokenizer` converts, and not converted yet.

    Raises :class:`UserError` for files that cannot be read.
    """
    check_directory(directory)
    return not (directory / _JSON).is_file() and _family(directory) is not None


def check_converted(directory: Path, flag: str) -> None:
    """Raise :class:`UserError` for a tokenizer that is yet to be converted, or cannot be read, given by ``flag``."""
    try:
        original = is_original(directory)
    except UserError as error:
        raise UserError(f"{flag} {directory}: {error}") from error
    if original:
        raise UserError(
            f"{flag} {directory} holds a tokenizer that is read by code of its own alone: convert it by {COMMAND} "
            f"{directory} OUT, and give OUT, or copy its files there."
        )


def convert_tokenizer(directory: Path) -> Converted:
    """The tokenizer of a model directory as published, converted exactly.

    A chat template that the directory has is kept; else it is the family's. Raises :class:`UserError` for a tokenizer
    of another kind, and for one that cannot be converted exactly.
    """
    check_directory(directory)
    family = _family(directory)
    if family is None:
        raise UserError(
            f"{directory} has no tokenizer of Qwen (*.tiktoken), Baichuan or InternLM2 (tokenizer.model, and "
            "tokenizer_config.json or config.json that names the family): others are read as they are."
        )
    settings = {**_json(directory / _MAP), **_json(directory / _CONFIG)}
    try:
        spec, roles, template = (_qwen if family == "qwen" else _pieces)(directory, settings, family)
    except (AttributeError, TypeError, ValueError) as error:  # of settings of other types than they are to have
        raise UserError(
            f"{directory} has settings of its tokenizer that are not understood ({one_line(error)}): restore them."
        ) from error
    for role in _ROLES:
        roles.update({role: content} if (content := _content(settings.get(role))) is not None else {})
    _check(spec, roles, directory)
    kept = {key: settings[key] for key in ("model_max_length", "padding_side") if key in settings}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles, **kept}
    return Converted(spec, config, _published_template(directory, settings) or template)


def _family(directory: Path) -> str | None:
    """The family of a folder's tokenizer, by what its configs say."""
    name = str(_json(directory / _CONFIG).get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    name = name.lower() or str(_json(directory / "config.json").get("model_type") or "")
    if name == "qwen" and len(list(directory.glob("*.tiktoken"))) == 1:
        return name
    return name if name in ("baichuan", "internlm2") and (directory / "tokenizer.model").is_file() else None


def _qwen(directory: Path, _: dict, __: str) -> tuple[dict, dict[str, str], str]:
    (file,) = directory.glob("*.tiktoken")
    ranks = read_ranks(file)
    spec = ranked_tokenizer(ranks, _QWEN_PATTERN, {"type": "NFC"})
    # They are found in the text as it is normalized, where what follows may have made their last character another.
    special = [_token(len(ranks) + i, text, True) for i, text in enumerate(_QWEN_SPECIAL)]
    spec["added_tokens"] = [{**token, "normalized": True} for token in special]
    return _complete(spec, [], []), {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, _QWEN_TEMPLATE


def _pieces(directory: Path, settings: dict, family: str) -> tuple[dict, dict[str, str], str | None]:
    model = read_piece_model(directory / "tokenizer.model")
    decoder = settings.get("added_tokens_decoder") or {}
    said = {int(i): (_content(token) or "", bool(token.get("special"))) for i, token in decoder.items()}
    said.update({i: (text, False) for text, i in _json(directory / _ADDED).items() if i not in said})
    size = len(model.pieces)
    names = {i: text for i, (text, _) in said.items() if i < size and text != model.pieces[i].text}
    spec = model.tokenizer(names)
    texts = [names.get(i, piece.text) for i, piece in enumerate(model.pieces)]
    chat = _chat_ids(model, _json(directory / _GENERATION)) if family == "baichuan" else None
    # What a file of settings lists, or a template writes, is one token wherever it stands.
    listed = {i: special for i, (_, special) in said.items()} | {
        i: True for i in chat or () if model.pieces[i].kind == NORMAL
    }
    known = {token["id"] for token in spec["added_tokens"]}
    for i, special in sorted(listed.items()):
        if i not in known:
            spec["added_tokens"].append(_token(i, texts[i] if i < size else said[i][0], special))
    spec["added_tokens"].sort(key=lambda token: token["id"])
    roles = {role: texts[i] for role, i in model.roles.items() if 0 <= i < size}
    around = [[roles[role]] if settings.get(key, default) and role in roles else [] for role, key, default in _AROUND]
    if family == "internlm2":
        return _complete(spec, *around), roles, _INTERNLM2_TEMPLATE
    template = chat and _BAICHUAN_TEMPLATE.format(user=texts[chat[0]], assistant=texts[chat[1]])
    return _complete(spec, *around), roles, template


#: What both families' tokenizers put around a text unless told otherwise.
_AROUND = (("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False))


def _chat_ids(model: PieceModel, generation: dict) -> tuple[int, int] | None:
    """Ids of what stands before a question and before an answer; None for a vocabulary that has none such."""
    user, assistant = (int(generation.get(key, default)) for key, default in _BAICHUAN_ROLES)
    found = [i < len(model.pieces) and model.pieces[i].text.startswith("<reserved_") for i in (user, assistant)]
    return (user, assistant) if all(found) else None


def _complete(spec: dict, before: list[str], after: list[str]) -> dict:
    """A ``tokenizer.json`` with the tokens ``before`` and ``after`` put around every text."""
    ids = {text: i for text, i in spec["model"]["vocab"].items() if text in (*before, *after)}
    around = (
        [{"SpecialToken": {"id": text, "type_id": 0}} for text in before],
        [{"SpecialToken": {"id": text, "type_id": 0}} for text in after],
    )
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    tokens = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    around_text = processor if tokens else None
    return {"version": "1.0", "truncation": None, "padding": None, "post_processor": around_text, **spec}


def _check(spec: dict, roles: dict[str, str], directory: Path) -> None:
    """Raise :class:`UserError` unless ``tokenizers`` loads it and gives every token the id that it is to have."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(_text(spec))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{directory} has a tokenizer that cannot be converted ({one_line(error)[:200]}).") from error
    for token in spec["added_tokens"]:
        if loaded.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{directory} gives {token['content']!r} the id {token['id']}, which is not the next after those of "
                "its vocabulary: it cannot be converted."
            )
    for role, content in roles.items():
        if loaded.token_to_id(content) is None:
            raise UserError(f"{directory} names {content!r} as {role}, which its tokenizer does not know: correct it.")


def _published_template(directory: Path, settings: dict) -> str | None:
    """The chat template that a directory has."""
    file = directory / _TEMPLATE
    found = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    return found if isinstance(found, str) else None


def _content(token: object) -> str | None:
    """The text of a token as files of settings have it, a string or an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _token(i: int, text: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": special}


def _json(file: Path) -> dict:
    """The object in a file, empty where there is no file. Raises :class:`UserError` for one that holds no object."""
    if not file.is_file():
        return {}
    try:
        return dict(json_value(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): restore it.") from error


def _text(content: dict, indent: int | None = None) -> str:
    return json.dumps(content, ensure_ascii=False, indent=indent)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    title, examples = (__doc__ or "").split("\n\n")
    parser = Parser(prog=COMMAND, description=title, epilog=f"examples:\n{examples}")
    parser.add_argument("directory", metavar="DIR", help="model directory, with the tokenizer as published")
    parser.add_argument("output", metavar="OUT", help="folder to write the tokenizer to")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Raises :class:`UserError` for what it cannot convert or must not replace."""
    args = build_parser().parse_args(argv)
    directory, output = Path(args.directory), Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not args.overwrite:
        raise UserError(f"{output} exists and is not empty: choose another folder or add --overwrite.")
    if output.resolve() == directory.resolve():
        raise UserError(f"{output} is what is read: choose another folder.")
    check_replaceable(str(output), str(output), MODEL)
    converted = convert_tokenizer(directory)
    try:
        with atomic_folder(output) as staging:
            names = converted.write(staging)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): choose another folder.") from error
    say(f"{len(converted.spec['model']['vocab']):,} tokens written to {output}: {', '.join(names)}")


if __name__ == "__main__":
    run_cli(main)
