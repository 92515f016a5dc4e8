"""What may be removed when something takes its place: what consists of names that we, or the tools that we stand
beside, write. All else is a user's own, wherever it lies."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fft.data.storage import Storage, reaching
from fft.data.store_owner import OWNERS
from fft.errors import UserError
from fft.files import TRIAL


@dataclass(frozen=True)
class Kind:
    """A kind of folder: ``what`` a sentence calls it, and by expressions the names of the ``files`` in it, and of
    ``folders`` and what they are; None for one in which anything may lie, or that is looked at by itself."""

    what: str
    files: str
    folders: "Mapping[str, Kind | None]" = field(default_factory=dict)

    def inside(self, folder: str) -> "list[Kind | None]":
        """What a folder of this name in it is: one kind; nothing where there is no such folder."""
        return [inner for pattern, inner in self.folders.items() if re.fullmatch(pattern, folder)][:1]


def stranger_in(place: Storage, kind: Kind, besides: Collection[str] = ()) -> str | None:
    """The first file or folder that is no part of what a folder should be, by its name in it; None for none, and where
    there is no such folder. ``besides`` are names that do not matter. Raises :class:`OSError`."""
    for name, size in sorted(place.here().items()):
        if name in besides or TRIAL.fullmatch(name):  # of another rank, or of one that was killed
            continue
        if size is not None:
            if not re.fullmatch(kind.files, name):
                return name
            continue
        inner = kind.inside(name)
        if not inner:
            return name
        if inner[0] is not None and (found := stranger_in(place.below(name), inner[0])) is not None:
            return f"{name}/{found}"
    return None


#: Code that models bring, as transformers names it.
_CODE = r"(configuration|modeling|modelling|tokenization|\w*processing|feature_extraction|generation)_\w+\.py"
#: What transformers, PEFT and this product write into a model's directory, and what the hub adds.
MODEL = Kind(
    "a model",
    "|".join(
        (
            r"(config|generation_config|adapter_config|configuration|\w*processor_config|\w*quant\w*_config)\.json",
            r"(model|pytorch_model|adapter_model|consolidated)[\w.-]*\.(safetensors|bin|pth)(\.index\.json)?",
            r"(tokenizer|vocab|chat_template)[\w.-]*|(special_tokens_map|added_tokens|normalizer|tekken)\.json",
            r"merges\.txt|[\w.-]+\.(model|tiktoken|jinja)",
            r"README\.md|\.gitattributes|(LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*",
            r"(training_args\.bin|(trainer_state|all_results|train_results|eval_results)\.json)",
            _CODE,
        )
    ),
    {
        OWNERS: None,
        "additional_chat_templates": Kind("templates", r".*\.jinja"),
        r"\.cache": Kind("", "", {"huggingface": None}),
    },
)


def check_replaceable(shown: str, place: str, kind: Kind, besides: Collection[str] = ()) -> None:
    """Raise :class:`UserError` where a folder, named as ``shown``, holds what would be lost if one of this ``kind``
    took its place: what has other names, but for those of ``besides``. In a store, too."""
    with reaching(place):
        found = stranger_in(Storage.at(place), kind, besides)
    if found is not None:
        raise UserError(
            f"{shown} holds {found}, which is no part of {kind.what} and would be lost: move it, or choose another "
            "folder."
        )


def names_in(folder: str | None) -> list[str]:
    """Names of what lies in a folder on a disk, for ``besides``: a model that is made of another has some of its
    files."""
    return os.listdir(folder) if folder is not None and Path(folder).is_dir() else []
