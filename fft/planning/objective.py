"""What is learned, tokens or preferences: of which tables and models, and by which model preferences are judged."""

import hashlib
import json
from typing import Any

from transformers import PretrainedConfig

from fft.arguments import TrainArguments
from fft.data.table import Table
from fft.errors import UserError
from fft.planning.identity import config_entries, weights_hash
from fft.weights.hf import WeightReader

#: The objective that learns preferences; the other is that of all tables.
DPO = "dpo"


def check_balance(args: TrainArguments, balanced: bool) -> None:
    """Raise :class:`UserError` for a model whose experts a loss keeps in balance, which preferences do not have."""
    if args.objective == DPO and balanced:
        raise UserError(
            f"--objective {DPO} does not go with a loss that keeps experts in balance (router_aux_loss_coef): set that "
            "to 0 in the model's config.json, or train another model."
        )


def check_pairs(args: TrainArguments, flag: str, table: Table) -> None:
    """Raise :class:`UserError` for a table that is none of what ``--objective`` learns."""
    if args.objective == DPO and not table.has_pairs:
        raise UserError(
            f"--{flag} {table.path} has no preferences, which --objective {DPO} learns: make a table of some with "
            "spark_jobs/tokenize.py --task preference."
        )
    if args.objective != DPO and table.has_pairs:
        raise UserError(
            f"--{flag} {table.path} has preferences, of which half was rejected: give --objective {DPO}, or a table of "
            "what was chosen alone, which spark_jobs/tokenize.py --task chat makes."
        )


def reference_model(
    args: TrainArguments, config: PretrainedConfig, weights: WeightReader, adapter: WeightReader | None = None
) -> str:
    """A name for the model with which a run begins, as it computes: a hash of its config, weights and type, of the
    ``adapter`` with which it begins, if there is one, and of four bits.

    Raises :class:`UserError` for weights that cannot be read.
    """
    facts: list[Any] = [config_entries(config), weights_hash(weights.directory), args.dtype]
    if adapter is not None:
        facts.append([weights_hash(adapter.directory), args.lora_dim, args.lora_alpha, args.use_rslora])
    if args.load_in_4bit:
        facts.append("nf4")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
