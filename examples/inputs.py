"""What the examples run on where you have nothing at hand: ``python -m examples.inputs``. No download.

Makes, from the sources of Python's standard library, below runs/examples:
``corpus.jsonl``, a document a file; ``chats.jsonl``, a question and an answer for each docstring; ``prompts.jsonl``,
the first questions alone; and ``model``, a chat model of three million random parameters with its tokenizer.
"""

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from fft.quickstart.corpus import read_texts, standard_library, write_corpus
from fft.quickstart.tokenizer import CHATML, train_tokenizer

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "runs/examples"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
#: So many questions are asked.
PROMPTS = 100


def main() -> None:
    """Make what is missing."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    corpus, chats, prompts = (OUTPUT / f"{name}.jsonl" for name in ("corpus", "chats", "prompts"))
    model = OUTPUT / "model"
    if not corpus.exists():
        write_corpus(standard_library(), corpus)
    if not chats.exists():
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in conversations(corpus)]
        chats.write_text("".join(lines), encoding="utf-8")
    if not prompts.exists():
        lines = chats.read_text(encoding="utf-8").splitlines()
        asked = list(dict.fromkeys(json.loads(line)["messages"][0]["content"] for line in lines))
        rows = [{"id": f"question-{i}", "prompt": question} for i, question in enumerate(asked[:PROMPTS])]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not (model / "config.json").exists():
        write_model(corpus, model)
    print(f"{OUTPUT.relative_to(ROOT)}: {', '.join(sorted(path.name for path in (corpus, chats, prompts, model)))}")


def conversations(corpus: Path) -> Iterator[list[dict[str, str]]]:
    """What every documented function or class of a corpus of Python sources is for, asked and answered."""
    for text in read_texts(corpus):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sources that a newer Python will not take
                tree = ast.parse(text)
        except (SyntaxError, ValueError):  # the library's own tests of bad sources
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (answer := ast.get_docstring(node)):
                question = f"What is {node.name} for?"
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_model(corpus: Path, output: Path) -> None:
    """A chat model that knows nothing yet: random weights, a tokenizer of the corpus, a chat template."""
    config = AutoConfig.from_pretrained(ROOT / "conf/models/llama-3m.json")
    tokenizer = train_tokenizer(read_texts(corpus), config.vocab_size - len(SPECIAL))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": SPECIAL[1]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(output)
    config.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(output)


if __name__ == "__main__":
    main()
