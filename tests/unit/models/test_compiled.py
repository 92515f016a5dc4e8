"""Decoder layers as graphs: the same losses and gradients, few graphs, none for other documents."""

from types import SimpleNamespace

import pytest
import torch

from fft.data.draws import token_draws
from fft.errors import UserError
from fft.models import compiled
from fft.models.causal_lm import StageBuilder
from fft.models.compiled import check_compiles, compiler_of
from fft.models.in_process import BOUNDS, InProcess, documents, loss_by_layers
from fft.models.layers import canonical_parameters
from fft.models.lora import Lora
from fft.models.small import small_config
from fft.models.spec import ModelSpec

#: Family: graphs of its layers, which are as many as there are kinds of layers. Windows with sinks and experts in
#: balance; capped scores; latent attention; ALiBi.
GRAPHS = {"llama": 1, "gpt_oss": 2, "gemma2": 2, "minicpm3": 1, "baichuan": 1}


@pytest.fixture(autouse=True)
def graphs():
    """How many were made so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def built(family, compiler="aot_eager", split=False, **options):
    builder = StageBuilder(ModelSpec(small_config(family), torch.float32, compiler=compiler, **options))
    return builder, InProcess(builder, split)


def gradients(run, loss):
    loss.backward()
    return {name: p.grad for name, p in canonical_parameters(run.modules).items() if p.grad is not None}


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("family", GRAPHS)
@pytest.mark.filterwarnings("ignore")
def test_losses_and_gradients_are_those_of_layers_that_are_not(family, selective, graphs):
    results = []
    for compiler in (None, "aot_eager"):
        builder, run = built(family, compiler, selective=selective)
        if builder.balance is not None:
            builder.balance.weight = 0.5
        loss = loss_by_layers(run)
        told = None if builder.balance is None else float(builder.balance.total)
        results.append((loss, told, gradients(run, loss)))
    (expected, balance, theirs), (ours, told, own) = results
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert told == pytest.approx(balance)
    assert own.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(own[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert graphs() == GRAPHS[family]


def test_other_documents_make_no_other_graph(graphs):
    _, run = built("llama")
    _, plain = built("llama", None)
    ids, _ = documents()
    for bounds in ([0, 17], [0, 5, 6, 17], [0, *range(1, 18)], [0, 16, 17]):
        torch.testing.assert_close(run(ids, bounds)[0], plain(ids, bounds)[0], rtol=1e-6, atol=1e-6)
    assert graphs() == 1
    with torch.no_grad():
        run(ids, [0, 9, 17])
    assert graphs() == 2  # of an evaluation


def test_rows_of_other_lengths_share_one_more(graphs):
    _, run = built("llama")
    ids, _ = documents()
    for tokens in (17, 12, 15, 9):
        run(ids[:, :tokens], [0, 4, tokens])
    assert graphs() == 2


def test_halves_are_graphs_of_their_own(graphs):
    losses = [loss_by_layers(built("llama", compiler, split=True)[1]) for compiler in (None, "aot_eager")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert graphs() == 2


def test_adapters_alone_are_trained(graphs):
    options = {"lora": Lora(2, 4, ("q_proj", "down_proj"))}
    own, theirs = (
        gradients(run, loss_by_layers(run)) for _, run in (built("llama", c, **options) for c in ("aot_eager", None))
    )
    assert own.keys() == theirs.keys()
    assert len(own) == 3 * 2 * 2
    for name, grad in theirs.items():
        torch.testing.assert_close(own[name], grad, rtol=1e-4, atol=1e-6)


def test_what_adapters_drop_is_part_of_the_graph(graphs):
    options = {"lora": Lora(2, 4, ("q_proj", "down_proj"), dropout=0.3, dora=True)}
    ids, _ = documents()
    found = []
    for compiler in ("aot_eager", None):
        _, run = built("llama", compiler, **options)
        for name, parameter in canonical_parameters(run.modules).items():
            if name.endswith("lora_B.weight"):  # zeros, which would hide everything
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        hidden = [run(ids, BOUNDS, torch.from_numpy(token_draws(0, [n], [0], 17)))[0] for n in (1, 2)]
        assert not torch.allclose(*hidden)
        found.append(hidden)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert graphs() <= 2


@pytest.mark.parametrize("flag", ["--ulysses_degree", "--expert_parallel_size"])
def test_what_ranks_exchange_within_a_layer_is_refused(flag):
    check_compiles(small_config("llama"), {flag: 1})
    with pytest.raises(UserError, match=f"--compile: {flag} must be 1, as what such ranks exchange"):
        check_compiles(small_config("llama"), {flag: 2})


def test_linear_attention_is_refused():
    with pytest.raises(UserError, match="--compile: linear attention of model type 'qwen3_next' runs once"):
        check_compiles(small_config("qwen3_next"), {})


def test_a_device_needs_a_compiler(monkeypatch):
    assert compiler_of("cpu") == "aot_eager"
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile needs Triton, which is not installed: train without it"):
        compiler_of("cuda")
    with pytest.raises(UserError, match="--compile needs an NVIDIA GPU or a CPU"):
        compiler_of("npu")
    monkeypatch.setattr(compiled, "find_spec", lambda name: SimpleNamespace())
    assert compiler_of("cuda") == "inductor"
