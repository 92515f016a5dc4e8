"""Train a byte-level BPE tokenizer on a corpus and save it as Hugging Face does."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fft.data.owner import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
#: A chat template for texts alone.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of at most ``vocab_size`` entries: the ``special_tokens``, of which the first ends a text, all
    256 bytes, and as many pieces as the texts give.

    The same texts give the same tokenizer, whatever the number of threads.
    """
    # Not before: --help of the quickstarts need not wait for these.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special_tokens[0], clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", output: Path) -> None:
    """Write the tokenizer's folder, whole or not at all; one that stood there is replaced."""
    with atomic_folder(output) as staging:
        tokenizer.save_pretrained(str(staging))
