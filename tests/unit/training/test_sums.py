"""Gradients added to their sums by themselves are those that autograd makes; and clipping within AdamW's pass."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fft.ops.cross_entropy import HeadSum, Targets, Vocabulary, linear_cross_entropy
from fft.training import sums
from fft.training.loss import TokenMeanLoss
from fft.training.optimizer import OnePassAdamW
from fft.training.sums import Bf16Sums, OwnSums, add_rows, gradient_sums, sum_embeddings


class Bf16Optimizer:
    """What :class:`Bf16Sums` asks of DeepSpeed's."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        self.bf16_groups = [list(parameters)]
        self.fp32_groups_gradients = [[torch.zeros(p.numel()) for p in parameters]]
        self.fp32_groups_has_gradients = [[False for _ in parameters]]

    def get_grads_for_norm(self, for_clipping: bool = False) -> object:
        gradients = self.fp32_groups_gradients[0]
        return gradients if for_clipping else (gradients, {})


def embed(padding: int | None, dtype: torch.dtype) -> tuple[nn.Embedding, torch.Tensor, torch.Tensor]:
    """An embedding, ids of which many are the same, and gradients of what it looks up."""
    torch.manual_seed(0)
    made = nn.Embedding(11, 8, padding_idx=padding, dtype=dtype)
    return made, torch.randint(11, (1, 300), dtype=torch.int32), torch.randn(1, 300, 8, dtype=dtype)


@pytest.mark.parametrize("padding", [None, 3])
def test_rows_are_added_as_autograd_would(padding):
    """In two micro-batches; the first finds no gradient yet."""
    made, ids, grads = embed(padding, torch.float32)
    for _ in range(2):
        made(ids).backward(grads)
    expected, made.weight.grad = made.weight.grad, None
    sum_embeddings(made, OwnSums())
    for _ in range(2):
        made(ids).backward(grads)
    torch.testing.assert_close(made.weight.grad, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_bf16_are_added_in_fp32():
    made, ids, grads = embed(None, torch.bfloat16)
    optimizer = Bf16Optimizer(made.weight)
    sum_embeddings(made, Bf16Sums(optimizer))
    made(ids).backward(grads)
    exact = torch.zeros(11, 8, dtype=torch.float64)
    add_rows(exact, ids[0], grads[0])
    ours = optimizer.fp32_groups_gradients[0][0].view(11, 8)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert made.weight.grad is None
    assert optimizer.fp32_groups_has_gradients == [[True]]
    again = torch.zeros(11, 8)
    add_rows(again, ids[0], grads[0])
    assert torch.equal(again, ours)  # rows of one number in the same order


def test_a_gradient_is_added_to_its_sum_to_the_bit():
    """As DeepSpeed adds it, which makes an fp32 copy first."""
    weight = nn.Parameter(torch.randn(7, 5).bfloat16())
    optimizer = Bf16Optimizer(weight)
    Bf16Sums(optimizer)
    expected = torch.zeros(7, 5)
    for seed in range(3):
        weight.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
        expected += weight.grad.float()
        optimizer._update_hp_grad(weight, 0, 0, clear_lp_grads=False)
    assert torch.equal(optimizer.fp32_groups_gradients[0][0].view(7, 5), expected)
    assert weight._hp_grad is optimizer.fp32_groups_gradients[0][0]


def test_the_norm_of_norms_is_asked_for_where_that_of_gradients_was():
    optimizer = Bf16Optimizer(*(nn.Parameter(torch.zeros(size).bfloat16()) for size in (4, 9)))
    gradients = optimizer.fp32_groups_gradients[0]
    for gradient in gradients:
        gradient.normal_()
    Bf16Sums(optimizer)
    ((norms,), experts) = optimizer.get_grads_for_norm()
    torch.testing.assert_close(norms.norm(), torch.cat(gradients).norm())
    assert experts == {}
    assert optimizer.get_grads_for_norm(for_clipping=True) is gradients


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_replicas_reduce_to_the_owner_of_a_part(rank, backend, monkeypatch):
    """Of three: the mean where a part's step is taken, and the norm of all, of parameters that lie across parts."""
    sizes, generator = (5, 7, 2, 4), torch.Generator().manual_seed(0)
    replicas = torch.randn(3, sum(sizes), generator=generator)
    whole, ends = replicas.mean(0), torch.tensor([0, *sizes]).cumsum(0).tolist()
    own = slice(6 * rank, 6 * rank + 6)

    class Sharing(Bf16Optimizer):
        def get_grads_for_norm(self, for_clipping: bool = False) -> object:  # the third is another rank's to count
            first, second, _, last = self.fp32_groups_gradients[0]
            return ([first, second, last], {})

    optimizer = Sharing(*(nn.Parameter(torch.zeros(size).bfloat16()) for size in sizes))
    flat = replicas[rank].clone()
    optimizer.fp32_groups_gradients = [[flat[a:b] for a, b in itertools.pairwise(ends)]]
    optimizer.fp32_groups_gradients_flat, optimizer.dp_process_group = [flat], object()
    optimizer.fp32_groups_gradient_flat_partition = [flat[own]]
    counted = torch.cat([whole[:12], whole[14:]])
    mine = torch.cat([whole[own][[i for i in range(6) if not 12 <= 6 * rank + i < 14]]])

    def all_reduce(squares, group):
        torch.testing.assert_close(squares, mine.square().sum())
        squares.copy_(counted.square().sum())

    def reduce_scatter(part, given, group):
        assert given is flat
        part.copy_(replicas.sum(0)[own])

    def trade(sent, received, group):
        at = len(exchanged) * 4  # elements of each part at a time
        torch.testing.assert_close(torch.stack(sent), replicas[rank].view(3, 6)[:, at : at + 4])
        for part, replica in zip(received, replicas, strict=True):
            part.copy_(replica[own][at : at + 4])
        exchanged.append(len(sent))

    exchanged = []
    told = SimpleNamespace(get_world_size=lambda group: 3, all_reduce=all_reduce, reduce_scatter_tensor=reduce_scatter)
    told.get_backend = lambda group: backend
    monkeypatch.setattr(sums, "trade", trade)
    monkeypatch.setattr(sums, "_CHUNK", 4)
    monkeypatch.setattr(sums, "dist", told)
    engine = SimpleNamespace(optimizer=optimizer, using_bf16_optimizer=True, has_moe_layers=False)
    gradient_sums(engine)
    engine._bf16_reduce_grads()
    assert exchanged == ([3, 3] if backend == "gloo" else [])
    torch.testing.assert_close(flat[own], whole[own])
    ((norm,), experts) = optimizer.get_grads_for_norm()
    torch.testing.assert_close(norm, counted.norm().view(1))
    assert experts == {}


@pytest.mark.parametrize("trained", [0, 9, 23])
@pytest.mark.parametrize("empty", [False, True])
def test_the_head_s_gradient_is_added_to_its_sum(empty, trained):
    """Times the factor that backward has; where nothing is trained, an empty sum is zeros."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, dtype=torch.float64), torch.randn(31, 8, dtype=torch.float64)
    labels = torch.randint(31, (23,)).masked_fill(torch.arange(23) >= trained, -100)
    results = []
    for total in (None, torch.full((31, 8), torch.nan if empty else 2.0, dtype=torch.float64)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        head = None if total is None else HeadSum(total, empty, 0.7)
        (linear_cross_entropy(*leaves, labels, Vocabulary(cap=3.0), head=head) * 0.7).backward()
        results.append((leaves[0].grad, leaves[1].grad if total is None else total - (0 if empty else 2)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def loss_of(sums: OwnSums) -> TokenMeanLoss:
    made = TokenMeanLoss(SimpleNamespace(vocabulary=Vocabulary()))
    made.scale = 0.5
    made.sum_into(sums, 4)
    return made


def test_the_loss_finds_the_head_s_sum_and_knows_what_backward_multiplies_by():
    weight, hidden = nn.Parameter(torch.randn(31, 8)), torch.randn(23, 8)
    targets = Targets.of(torch.randint(31, (23,)))
    loss = loss_of(OwnSums())
    with torch.no_grad():
        loss((hidden, weight.view_as(weight)), targets)
    assert weight.grad is None
    (loss((hidden, weight.view_as(weight)), targets) / 4).backward()
    (ours,) = (weight.grad.clone(),)
    expected = weight.detach().clone().requires_grad_()
    (linear_cross_entropy(hidden, expected, targets) * 0.5 / 4).backward()
    torch.testing.assert_close(ours, expected.grad)
    with pytest.raises(RuntimeError, match="multiplies losses by"):
        (loss_of(OwnSums())((hidden, weight.view_as(weight)), targets) / 2).backward()


def test_a_head_that_is_computed_has_no_sum():
    weight, hidden = nn.Parameter(torch.randn(31, 8)), torch.randn(23, 8)
    loss = loss_of(OwnSums())
    loss((hidden, nn.functional.normalize(weight)), Targets.of(torch.randint(31, (23,))))
    assert weight.grad is None


@pytest.mark.parametrize("norm", [0.3, 5.0])
def test_clipping_within_the_pass_is_clipping_before_it(norm):
    torch.manual_seed(0)
    values, grad, results = torch.randn(1000), torch.randn(1000), []
    for fused, clipped in ((True, True), (False, True), (True, False)):
        parameter = nn.Parameter(values.clone())
        made = OnePassAdamW([{"params": [parameter]}], 1.0, lr=0.1, fused=fused)
        made.norm = (lambda: torch.tensor(norm)) if clipped else None
        for _ in range(2):
            parameter.grad = grad if clipped else grad * min(1.0, 1 / (norm + 1e-6))
            parameter.grad = parameter.grad.clone()
            made.step()
        results.append(parameter.detach())
    for ours in results[:2]:
        torch.testing.assert_close(ours, results[2], rtol=1e-6, atol=1e-6)
