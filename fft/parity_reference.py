"""What a run is compared with: a plain loop of transformers and torch in one process, one document at a time.

It shares with the trainer how samples are dealt, the schedule, and which parameters are trained; nothing that a layout,
an engine or a kernel could get wrong.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fft.arguments import TrainArguments
from fft.checkpoint.adapter import adapter_parameters
from fft.data.batches import MicroBatch, micro_batch, step_batches
from fft.data.samples import Samples
from fft.data.table import IGNORE
from fft.errors import UserError
from fft.images.pixels import normalized
from fft.images.positions import image_begins
from fft.images.rules import GRIDS, ImageRules
from fft.models.four_bits import round_weights
from fft.models.lora import Lora, adapt, dropping, freeze, reset_adapters
from fft.models.vision import PARTS, auto_class, decoder_path, vision_parts
from fft.planning.preflight import Plan, batch_plan
from fft.training.schedule import lr_multiplier


@dataclass
class Outcome:
    """What a run did: per step, and at its end by parameter. ``gradients`` are AdamW's first moments."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    evaluations: list[float] = field(default_factory=list)


def document_losses(
    model: PreTrainedModel, batch: MicroBatch, rules: ImageRules | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of next-token losses, each document run through the model on its own, and the experts' balance loss.

    ``rules`` are those of the images that the documents have.
    """
    total, routed = torch.zeros(()), defaultdict(list)
    says = _routed(model)
    balanced = getattr(says, "router_aux_loss_coef", None) is not None
    input_ids, bounds = torch.from_numpy(batch.input_ids[0]).long(), np.unique(batch.cu_seqlens).tolist()
    seen = defaultdict(dict) if rules is None else images_of(batch, bounds, rules)
    adapters, draws = dropping(model), batch.draws
    for a, b in itertools.pairwise(bounds):
        for adapter in adapters:
            adapter.draws = None if draws is None else torch.from_numpy(draws[a:b]).int()
        labels = torch.from_numpy(batch.labels[a:b])
        if balanced or (labels != IGNORE).any():
            options: dict[str, Any] = {"output_router_logits": True} if balanced else {}
            outputs = model(input_ids[a:b][None], **options, **seen[a])
            total = total + nn.functional.cross_entropy(outputs.logits[0], labels, reduction="sum", ignore_index=IGNORE)
            for layer, logits in enumerate(outputs.router_logits if balanced else ()):
                routed[layer].append(logits)
    balance = [
        sys.modules[type(model).__module__].load_balancing_loss_func(
            (torch.cat(logits),), says.num_experts, says.num_experts_per_tok
        )
        for logits in routed.values()
    ]
    return total, torch.stack([torch.as_tensor(b) for b in balance]).mean() if balance else torch.zeros(())


def _routed(model: PreTrainedModel) -> Any:
    """What says how many experts there are, and the weight of their balance loss: the model, beside the function that
    it uses, or, where it sees images, the config of its decoder.
    """
    return model.config.get_text_config() if model.config.model_type in PARTS else model


@torch.no_grad()
def mean_loss(model: PreTrainedModel, reader: Samples) -> float:
    """Mean loss over the trained tokens of an epoch, as the trainer evaluates."""
    batches = [micro_batch(reader, [i], i + 1) for i in range(reader.samples_per_epoch)]
    losses = [float(document_losses(model, batch, reader.rules)[0]) for batch in batches]
    return sum(losses) / sum(batch.trained for batch in batches)


def images_of(batch: MicroBatch, bounds: Sequence[int], rules: ImageRules) -> dict[int, dict[str, Any]]:
    """By where a document begins, what transformers' model takes of its images: pixels and grids."""
    images, found = batch.images, {}
    if images is None:
        raise ValueError("a micro-batch of a run with images has none")
    counts = images.grids[:-1].prod(1)
    begins = image_begins(batch.input_ids[0], counts // rules.merge**2, rules.image_token)
    ends, pixels = np.cumsum(counts), normalized(images.patches, rules)
    for a, b in itertools.pairwise(bounds):
        own = np.flatnonzero((begins >= a) & (begins < b))
        found[a] = {}
        if not len(own):
            continue
        grids, patches = images.grids[own], pixels[ends[own[0]] - counts[own[0]] : ends[own[-1]]]
        if rules.family in GRIDS:
            frames = np.repeat(patches.reshape(len(patches), 3, 1, -1), rules.temporal, axis=2)
            found[a]["pixel_values"] = torch.from_numpy(frames.reshape(len(patches), -1))
            found[a]["image_grid_thw"] = torch.from_numpy(grids).long()
            of_images = torch.from_numpy(batch.input_ids[0, a:b] == rules.image_token)
            found[a]["mm_token_type_ids"] = of_images.int()[None]
            stops = begins[own] + counts[own] // rules.merge**2
            if (stops[:-1] == begins[own][1:]).any():  # transformers takes images without a token between them for one
                found[a]["position_ids"] = torch.from_numpy(images.positions[:, None, a:b]).long()
        else:
            patch, side = rules.patch, rules.tile // rules.patch
            squares = patches.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
            found[a]["pixel_values"] = torch.from_numpy(squares.reshape(-1, 3, rules.tile, rules.tile))
    return found


def one_process(directory: Path, args: TrainArguments, plan: Plan) -> Outcome:
    """Train the model in ``directory`` as ``args`` say, by transformers and torch alone.

    Raises :class:`UserError` without a table to train on.
    """
    model = auto_class(plan.config).from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    lora = Lora.of(args)
    if lora is not None:
        adapt(model, f"{decoder_path(model)}.layers", lora, vision_parts(model))
        if args.load_in_4bit:
            round_weights(model, f"{decoder_path(model)}.layers")
        reset_adapters(model, args.seed)
    if args.freeze:
        freeze(model, args.freeze)
    found = train_alone(model, args, plan)
    return found if lora is None else replace(found, weights=adapter_parameters(found.weights))


def train_alone(model: PreTrainedModel, args: TrainArguments, plan: Plan) -> Outcome:
    """Train what is not frozen of ``model``, as ``args`` say. Raises :class:`UserError` without a table to train on."""
    train = plan.train
    if train is None:
        raise UserError("a comparison needs steps: give --train_data.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices, vectors = ([p for p in parameters.values() if (p.ndim < 2) == small] for small in (False, True))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
    floor = args.min_learning_rate / args.learning_rate
    multiplier = lr_multiplier(args.lr_scheduler_type, args.warmup_steps, plan.total_steps, floor, args.decay_ratio)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    evaluations = [mean_loss(model, plan.evaluation)] if plan.evaluation else []
    dealt = [batch_plan(args, plan.mesh, replica) for replica in range(plan.mesh.data)]
    losses, norms = [], []
    for step in range(plan.total_steps):
        first = step * dealt[0].global_batch
        batches = [batch for deal in dealt for batch in step_batches(train, deal, first, plan.total_samples)]
        for parameter in parameters.values():  # a step without an image moves a tower, too: by what it remembers
            parameter.grad = None if train.rules is None else torch.zeros_like(parameter)
        losses.append(_backward(model, batches, train.rules))
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm or float("inf"))))
        optimizer.step()
        schedule.step()
    if plan.evaluation:
        evaluations.append(mean_loss(model, plan.evaluation))
    # Biases that balance experts are parameters here that get no gradient.
    gradients = {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items() if p in optimizer.state}
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Outcome(losses, norms, weights, gradients, evaluations)


def _backward(model: PreTrainedModel, batches: Sequence[MicroBatch], rules: ImageRules | None) -> float:
    """Gradients of a global batch, one micro-batch's graph at a time; returns its loss, without that of experts."""
    trained, total = sum(b.trained for b in batches), 0.0
    weight = getattr(_routed(model), "router_aux_loss_coef", 0.0) / len(batches)
    for batch in batches:
        loss, balance = document_losses(model, batch, rules)
        if (objective := loss / trained + weight * balance).requires_grad:
            objective.backward()
        total += loss.item() / trained
    return total
