"""What the model that a run begins with says of preferences: computed once, by the run's own ranks, kept by the table.

With adapters that is the model that they are for, since at the beginning they add nothing; where training goes on with
an adapter that there is (``--adapter_name_or_path``), the model with it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from fft.arguments import TrainArguments
from fft.console import duration
from fft.data.batches import BatchPlan, Loader, MicroBatch
from fft.data.pairs import Reference, keep_reference, read_reference, reference_name, row_key
from fft.data.samples import TableSamples
from fft.data.table import Table
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.planning.objective import DPO, reference_model
from fft.planning.preflight import Plan, batch_plan
from fft.training.engine import StageEngine
from fft.training.feed import own_share
from fft.training.loss import PairMeanLoss

Log = Callable[[str], None]


def with_references(
    args: TrainArguments,
    plan: Plan,
    engine: StageEngine,
    builder: StageBuilder,
    control: dist.ProcessGroup,
    log: Log,
) -> Plan:
    """The plan of a run; of one on preferences, with tables that come with what the reference model says of them.

    ``engine`` has the weights that the run begins with, unless it is resumed. ``control`` is a group of all ranks that
    sends what is in host memory. Collective. Raises :class:`UserError` where a file is none, cannot be written, or is
    missing to a run that is resumed: its weights are no reference any more.
    """
    if args.objective != DPO:
        return plan
    if plan.weights is None:
        raise UserError("preferences need a model to begin with: give --model without --init.")
    model, known = reference_model(args, plan.config, plan.weights, plan.adapter), {}
    for reader in filter(None, (plan.train if plan.total_steps else None, *plan.evaluations.values())):
        for member in reader.members:
            table = member.table
            if table.source not in known:
                name = reference_name(model, table.fingerprint)
                found = _kept(table, name, control)
                if found is not None:  # which is said: whoever may write beside the table may have made it
                    log(f"reference log-probabilities of {table.source} are those of {table.storage.shown(name)}")
                else:
                    _check_start(args, engine, table, name)
                    found = _computed(args, plan, engine, builder, member, control, log)
                    if dist.get_rank() == 0:
                        keep_reference(table.storage, name, found)
                known[table.source] = found
    train = plan.train and plan.train.with_pairs(known)
    evaluations = {name: reader.with_pairs(known) for name, reader in plan.evaluations.items()}
    return dataclasses.replace(plan, train=train, evaluations=evaluations)


def _check_start(args: TrainArguments, engine: StageEngine, table: Table, name: str) -> None:
    if engine.deepspeed.global_steps:
        raise UserError(
            f"--resume: {table.storage.shown(name)} is missing, what {_begun(args)} in {args.dtype} says of "
            f"{table.source}, and the weights of a run that has begun are no reference: give --model, --dtype and "
            "--adapter_name_or_path with which it began, and a table that has the file, or begin a new run."
        )


def _begun(args: TrainArguments) -> str:
    """The model with which a run begins, in words."""
    model = str(args.from_ckpt or args.model)
    return f"{model} with {args.adapter_name_or_path}" if args.adapter_name_or_path else model


def _kept(table: Table, name: str, control: dist.ProcessGroup) -> Reference | None:
    """What the first rank finds beside a table, on all ranks. Collective."""
    found = read_reference(table.storage, name, table.tokens) if dist.get_rank() == 0 else None
    size = torch.tensor(-1 if found is None else len(found.keys))
    dist.broadcast(size, 0, group=control)
    if size < 0:
        return None
    keys, values = torch.empty(int(size), dtype=torch.int64), torch.empty(int(size))
    if found is not None:
        keys.copy_(torch.from_numpy(found.keys.copy())), values.copy_(torch.from_numpy(found.values.copy()))
    for tensor in (keys, values):
        dist.broadcast(tensor, 0, group=control)
    return Reference(keys.numpy(), values.numpy())


def _computed(
    args: TrainArguments,
    plan: Plan,
    engine: StageEngine,
    builder: StageBuilder,
    member: TableSamples,
    control: dist.ProcessGroup,
    log: Log,
) -> Reference:
    """What the engine's model says of every document of a table. Collective."""
    begun, role = time.perf_counter(), engine.role
    batches = dataclasses.replace(batch_plan(args, plan.mesh, role.replica), micro_batches=1)
    reader = member.for_stage(ids=role.first, labels=role.last)
    count, keys = -(-reader.samples_per_epoch // batches.global_batch), []
    read = _micro_batches(reader, batches, keys) if role.reads else ()
    shared = (own_share(batch, builder.ranks.sequence) for batch in read)
    values = _log_probabilities(engine, shared, count)
    counts = role.counts and role.sequence == 0
    own = np.concatenate(keys) if counts else np.empty(0, np.int64), values if counts else np.empty(0, np.float32)
    found = Reference.of(*_from_all(own, control))
    if not np.isfinite(found.values).all():
        raise UserError(f"{_begun(args)} gives a document of {member.table.path} no finite probability.")
    pairs, took = len(found.keys) // 2, duration(time.perf_counter() - begun)
    log(f"reference log-probabilities of {pairs:,} pairs of {member.table.source} computed in {took}, kept beside it")
    return found


def _log_probabilities(engine: StageEngine, batches: Iterable[MicroBatch], count: int) -> np.ndarray:
    """Those of the documents of so many micro-batches, float32, on ranks of the last stage. Collective."""
    if not isinstance(engine.loss, PairMeanLoss):
        raise TypeError("the run learns no preferences")
    recorded = engine.loss.recorded = []
    engine.sum_losses(batches, count)
    engine.loss.recorded = None
    return torch.cat(recorded).float().cpu().numpy() if recorded else np.empty(0, np.float32)


def _micro_batches(reader: TableSamples, batches: BatchPlan, keys: list[np.ndarray]) -> Iterator[MicroBatch]:
    """An epoch of a replica; to ``keys`` the rows of each micro-batch's documents are added."""
    total = reader.samples_per_epoch
    for number, (batch,) in enumerate(Loader(reader, batches, total)):
        (indices,) = batches.indices(number * batches.global_batch)
        keys.append(_rows_of(reader, [index for index in indices if index < total]))
        yield batch


def _rows_of(reader: TableSamples, indices: Iterable[int]) -> np.ndarray:
    found = [np.empty(0, np.int64)]
    for spans in reader.samples([*indices]):
        for span, rows in spans:
            found.append(np.repeat(row_key(span.group, span.row), len(rows.reference_of(span.row))))
    return np.concatenate(found)


def _from_all(own: tuple[np.ndarray, np.ndarray], control: dist.ProcessGroup) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of all ranks, one rank's after the other. Collective."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own[0])]), group=control)
    gathered = []
    for array in own:
        padded = np.zeros(max(map(int, sizes)), array.dtype)
        padded[: len(array)] = array
        parts = [torch.empty(len(padded), dtype=torch.from_numpy(padded).dtype) for _ in sizes]
        dist.all_gather(parts, torch.from_numpy(padded), group=control)
        gathered.append(np.concatenate([part[: int(size)].numpy() for part, size in zip(parts, sizes, strict=True)]))
    return gathered[0], gathered[1]
