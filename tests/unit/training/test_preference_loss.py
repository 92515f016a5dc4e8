"""The loss of preferences: log-probabilities of tokens, sums of documents, pairs; each against torch written apart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.models.causal_lm import Ranks
from fft.ops import cross_entropy
from fft.ops.cross_entropy import Targets, Vocabulary, token_log_probs
from fft.ops.logits import PlainLogits
from fft.training.loss import PairMeanLoss
from fft.training.preference import MEASURES, Preference, measures_of


class _Builder:
    """What a loss asks of the builder of a stage."""

    vocabulary, ranks = Vocabulary(), Ranks()


@pytest.mark.parametrize(("cap", "rows"), [(None, 1 << 29), (3.0, 7 * 8 * 11)])
def test_log_probabilities_of_tokens_are_those_of_a_softmax(cap, rows, monkeypatch):
    """In one piece, and in several, of capped logits with a bias."""
    monkeypatch.setattr(cross_entropy, "PIECE", rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    bias = torch.randn(11, dtype=torch.float64) if cap else None
    positions, ids = torch.tensor([0, 3, 4, 9, 17]), torch.tensor([1, 10, 0, 4, 4])
    factors = torch.randn(5, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    found = token_log_probs(*inputs[:2], Targets(positions, ids), Vocabulary(cap=cap), *inputs[2:])
    (found * factors).sum().backward()
    own = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    scores = own[0] @ own[1].t() + (own[2] if cap else 0)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    expected = scores.log_softmax(-1)[positions, ids]
    (expected * factors).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(inputs, own, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_a_head_that_is_not_trained_are_made_once(dtype, monkeypatch):
    """And its states have the gradients of one that is."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8).to(dtype), torch.randn(11, 8).to(dtype)
    targets, factors = Targets(torch.tensor([0, 3, 4, 9, 17]), torch.tensor([1, 10, 0, 4, 4])), torch.randn(5)
    made = []
    monkeypatch.setattr(cross_entropy, "choose_logits", lambda *_: lambda *of: made.append(1) or PlainLogits(*of))

    def run(trained):
        made.clear()
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        found = token_log_probs(states, head, targets)
        (found * factors).sum().backward()
        return len(made), found, states.grad, head.grad

    (once, ours, gradient, none), (twice, theirs, expected, _) = run(False), run(True)
    assert (once, twice, none) == (1, 2, None)
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [token_log_probs, cross_entropy.linear_cross_entropy])
def test_nothing_is_formed_for_gradients_that_nobody_records(function, monkeypatch):
    """An evaluation's parameters ask for some all the same."""
    monkeypatch.setattr(cross_entropy._Gradients, "add", lambda *_: pytest.fail("a gradient was formed"))
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with torch.no_grad():
        assert not function(hidden, weight, Targets(torch.tensor([0, 3]), torch.tensor([1, 2]))).requires_grad


def dpo_as_published(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Of arXiv:2305.18290, its appendix: a pair at a time, in numbers."""
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    return math.log1p(math.exp(-beta * logits)) if beta * logits > -30 else -beta * logits


numbers = st.floats(-200, -0.01)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers, numbers, numbers, st.integers(1, 50), st.integers(1, 50)), min_size=1),
    st.floats(0.01, 1),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
def test_losses_are_the_published_formula(pairs, beta, normalized, weight):
    table = torch.tensor(pairs, dtype=torch.float64)
    policy, reference, tokens = table[:, :2].requires_grad_(), table[:, 2:4].detach(), table[:, 4:].detach()
    losses, rewards = Preference(beta, normalized, weight).losses(policy, reference, tokens)
    expected = []
    for c, r, ref_c, ref_r, n_c, n_r in pairs:
        per_c, per_r = (n_c, n_r) if normalized else (1, 1)
        loss = dpo_as_published(c / per_c, r / per_r, ref_c / per_c, ref_r / per_r, beta)
        expected.append(loss - weight * c / n_c)
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    chosen, rejected, margin, right, count = measures_of(rewards).tolist()
    assert count == len(pairs)
    assert margin == pytest.approx(chosen - rejected, rel=1e-9, abs=1e-9)
    assert right == sum(float(a > b) for a, b in rewards.tolist())
    assert len(MEASURES) == 4
    losses.sum().backward()
    assert torch.isfinite(policy.grad if policy.is_leaf else losses.detach()).all()


def micro_batch(seed=0):
    """Head, targets of two pairs of 3, 2, 4 and 1 tokens, and reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(14, 6, generator=generator)
    weight = torch.randn(9, 6, generator=generator).requires_grad_()
    positions = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 10, 12])
    ids = torch.randint(9, (10,), generator=generator)
    return hidden.requires_grad_(), weight, positions, ids, torch.tensor([3, 2, 4, 1]), -torch.rand(4) * 10


def test_a_micro_batch_is_the_sum_over_its_pairs():
    hidden, weight, positions, ids, counts, reference = micro_batch()
    loss = PairMeanLoss(_Builder, Preference(0.3))
    loss.scale = 0.25
    found = loss((hidden, weight), (positions, ids, counts, reference))
    found.backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    each = (hidden @ weight.t()).log_softmax(-1)[positions, ids]
    a, b, c, d = (part.sum() for part in each.split(counts.tolist()))
    margins = torch.stack([(a - b) - (reference[0] - reference[1]), (c - d) - (reference[2] - reference[3])])
    expected = -torch.log(torch.sigmoid(0.3 * margins)).sum() * 0.25
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, (hidden.grad, weight.grad))
    taken = loss.take_measures()
    assert taken[2] == pytest.approx(0.3 * float(margins.sum().detach()), rel=1e-5)
    assert taken[4] == 2
    assert not loss.take_measures().any()


def test_no_pair_has_no_loss_and_gradients_of_zero():
    hidden, weight, *_ = micro_batch()
    none = torch.empty(0, dtype=torch.int64)
    found = PairMeanLoss(_Builder, Preference(0.1, sft_weight=1.0))(
        (hidden, weight), (none, none, none, torch.empty(0))
    )
    found.backward()
    assert not found
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_what_the_reference_says_is_recorded_in_place_of_measures():
    hidden, weight, positions, ids, counts, _ = micro_batch()
    loss = PairMeanLoss(_Builder, Preference(0.1))
    loss.recorded = []
    with torch.no_grad():
        loss((hidden, weight), (positions, ids, counts, torch.zeros(4)))
    each = (hidden @ weight.t()).log_softmax(-1)[positions, ids]
    torch.testing.assert_close(loss.recorded[0], torch.stack([x.sum() for x in each.split(counts.tolist())]))
    assert not loss.take_measures().any()
