"""Parameters that files hold under other names, as rows of several tensors, or together with others."""

import pytest
import torch
from safetensors.torch import save_file

from fft.parallel.tensor_plan import Shard
from fft.weights.hf import WeightReader
from fft.weights.names import StoredNames, StoredRows

HEAD, WIDTH = 2, 5
#: Two groups of two query heads, a key head and a value head, as InternLM2 keeps them: not all queries first.
FUSED = (2 * 4 * HEAD, WIDTH)
SPANS = {"q": ((0, 4), (8, 12)), "k": ((4, 6), (12, 14)), "v": ((6, 8), (14, 16))}
EXPERTS = tuple(StoredRows(f"experts.{e}.{kind}", (4, WIDTH)) for e in range(3) for kind in ("w1", "w3"))
PIECES = {
    **{f"{kind}.weight": (StoredRows("wqkv.weight", FUSED, spans),) for kind, spans in SPANS.items()},
    "mlp.gate_up": EXPERTS,
    "router.bias": (StoredRows("gate.bias", (6,)),),
}
NAMES = StoredNames(PIECES)


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    shapes = {"q.weight": (8, WIDTH), "k.weight": (4, WIDTH), "v.weight": (4, WIDTH)}
    shapes |= {"mlp.gate_up": (3, 8, WIDTH), "router.bias": (6,), "norm.weight": (WIDTH,), "beta": ()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def reader(parameters, tmp_path):
    save_file({n: t.contiguous() for n, t in NAMES.to_stored(parameters).items()}, tmp_path / "model.safetensors")
    return WeightReader(tmp_path)


def test_rows_are_written_where_files_have_them(parameters):
    stored = NAMES.to_stored(parameters)
    fused = stored["wqkv.weight"].view(2, 4, HEAD, WIDTH)
    assert torch.equal(fused[:, :2].reshape(8, WIDTH), parameters["q.weight"])
    assert torch.equal(fused[:, 2].reshape(4, WIDTH), parameters["k.weight"])
    assert torch.equal(fused[:, 3].reshape(4, WIDTH), parameters["v.weight"])
    assert torch.equal(stored["experts.1.w3"], parameters["mlp.gate_up"][1, 4:])
    assert torch.equal(stored["gate.bias"], parameters["router.bias"])
    assert set(stored) == {"wqkv.weight", "gate.bias", "norm.weight", "beta", *(piece.name for piece in EXPERTS)}
    assert stored["experts.0.w1"].data_ptr() == parameters["mlp.gate_up"].data_ptr()  # a view


CUTS = [
    *[("q.weight", 0, ((0, 3),)), ("q.weight", 0, ((3, 8),)), ("k.weight", 0, ((1, 3),)), ("v.weight", 1, ((1, 4),))],
    *[("mlp.gate_up", 1, ((0, 2), (4, 6))), ("mlp.gate_up", 1, ((2, 4), (6, 8))), ("mlp.gate_up", 2, ((3, 5),))],
    *[("mlp.gate_up", 0, ((1, 3),)), ("router.bias", 0, ((2, 5),))],
]


@pytest.mark.parametrize(("name", "dim", "spans"), CUTS)
def test_a_part_is_read_alone(name, dim, spans, parameters, reader):
    whole = parameters[name]
    shard = Shard(tuple(whole.shape), dim, spans)
    assert torch.equal(reader.read(name, whole.shape, shard, NAMES.pieces(name)), shard.of(whole))


def test_all_are_read_whole(parameters, reader):
    for name, value in parameters.items():
        assert torch.equal(reader.read(name, value.shape, None, NAMES.pieces(name)), value), name


def test_a_stored_tensor_is_not_written_without_all_of_its_parameters(parameters):
    del parameters["k.weight"]
    with pytest.raises(ValueError, match=r"wqkv\.weight cannot be written without k\.weight"):
        NAMES.to_stored(parameters)


def test_who_writes_one_parameter_of_a_tensor_writes_the_others():
    assert NAMES.together("q.weight") == NAMES.together("v.weight") == "wqkv.weight"
    assert NAMES.together("norm.weight") == "norm.weight"
