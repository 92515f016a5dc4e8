"""What a run says of itself to a server of experiments: settings, tables, environment, layout."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from fft.arguments import TrainArguments
from fft.checkpoint.folder import METRICS
from fft.checkpoint.run import RunFolder
from fft.data.manifest import trained_by
from fft.data.storage import is_url
from fft.data.table import Table
from fft.planning.layout import Layout, describe
from fft.planning.preflight import Plan
from fft.redaction import redact_all
from fft.training.mlflow_sink import RunFacts, UsedTable


def run_facts(
    args: TrainArguments, plan: Plan, layout: Layout, run: RunFolder | None, state: Mapping[str, Any]
) -> RunFacts:
    """Of a run with the folder ``run``, if any, that goes on with the checkpoint of this ``state``, if it has any."""
    texts = {"arguments.yaml": yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)}
    texts["plan.txt"] = describe(args, plan.config.model_type, layout)
    if run is not None:
        texts |= {name: run.text(name) or "" for name in ("environment.yaml", "data.yaml")}
    notes = run.shown(METRICS) if run is not None else None
    return RunFacts(
        redact_all(dataclasses.asdict(args)), list(_tables(plan)), texts, state.get("mlflow"), state.get("wandb"), notes
    )


def _tables(plan: Plan) -> Iterator[UsedTable]:
    for table in plan.train.tables if plan.train is not None else ():
        yield _used(table, "training")
    for reader in plan.evaluations.values():
        for table in reader.tables:
            yield _used(table, "evaluation")


def _used(table: Table, context: str) -> UsedTable:
    delta = table.version is not None
    kind = "delta_table" if delta else table.path.partition("://")[0] if is_url(table.path) else "local"
    source = {"path": table.path, "delta_table_version": table.version} if delta else {"uri": table.path}
    made_by = table.manifest.tokenizer if table.manifest else None
    profile = {"rows": table.rows, "tokens": table.tokens, "version": table.version, "fingerprint": table.fingerprint}
    if (trained := trained_by(table.manifest)) is not None:
        profile["trained_tokens"] = trained
    if made_by is not None:
        profile |= {"tokenizer": made_by.name, "tokenizer_sha256": made_by.sha256}
    name = PurePath(table.path).name or table.path
    return UsedTable(context, name, table.fingerprint, kind, redact_all(source), sorted(table.columns), profile)
