"""Every layout against one process: transformers and torch.optim, one document at a time (fft/parity_reference.py)."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, VOCAB, write_table
from forked import run_ranks
from ports import free_port
from thorough import thorough
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint import adapter
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.models import small
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

STEPS, GLOBAL_BATCH, SEQ_LEN, LR, CLIP = 5, 8, 64, 1e-3, 0.5

FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "router_aux_loss_coef": 0.1,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.1,
    },
    # ALiBi, and a normalized head; in files q, k and v are one tensor.
    "baichuan": {
        "model_type": "baichuan",
        "num_key_value_heads": 4,
        "max_position_embeddings": None,
        "z_loss_weight": 0,
    },
}

#: Name: launcher, ranks, flags besides those all share. The global batch is always GLOBAL_BATCH samples.
LAYOUTS = {
    "one": ("python", 1, "--per_device_train_batch_size 2 --gradient_accumulation_steps 4"),
    "pipe2": ("deepspeed", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8"),
    "data2": ("torchrun", 2, "--gradient_accumulation_steps 4"),
    "pipe2-data2": ("deepspeed", 4, "--pipe_parallel_size 2 --gradient_accumulation_steps 4"),
    "sequence2": ("torchrun", 2, "--sequence_parallel_size 2 --gradient_accumulation_steps 8"),
    "pipe2-sequence2": (
        "deepspeed",
        4,
        "--pipe_parallel_size 2 --sequence_parallel_size 2 --gradient_accumulation_steps 8 "
        "--checkpoint_grad_interval 1",
    ),
    "tensor2": ("torchrun", 2, "--model_parallel_size 2 --gradient_accumulation_steps 8"),
    "pipe2-tensor2": ("deepspeed", 4, "--pipe_parallel_size 2 --model_parallel_size 2 --gradient_accumulation_steps 8"),
    "data2-tensor2": ("torchrun", 4, "--model_parallel_size 2 --gradient_accumulation_steps 4"),
    "pipe2-split-recompute": (
        "deepspeed",
        2,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --split_dlayer --checkpoint_grad_interval 1 "
        "--partition_method 4,5",
    ),
    "pipe2-data2-offload": (
        "torchrun",
        4,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 4 --offload_optimizer",
    ),
    "pipe2-expert2": (
        "torchrun",
        4,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 4 --expert_parallel_size 2",
    ),
    "data2-tensor2-expert2": (
        "torchrun",
        4,
        "--model_parallel_size 2 --gradient_accumulation_steps 4 --expert_parallel_size 2",
    ),
}
#: Those that a launcher of its own starts.
LAUNCHED = ("one", "pipe2", "sequence2", thorough("pipe2-tensor2"))


def factorisations(world: int) -> list[tuple[int, int, int, int]]:
    """All (data, pipe, sequence, tensor) whose product is ``world``."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return [shape for shape in itertools.product(sizes, repeat=4) if np.prod(shape) == world]


def layout_flags(family: str, shape: tuple[int, int, int, int], number: int) -> list[str]:
    """Flags of a layout, with every other option on in every second, fourth, ... case."""
    data, pipe, sequence, tensor = shape
    # The experts' balance is that of a micro-batch: the reference's have one sample.
    samples = 2 if number % 3 == 0 and data <= 2 and "moe" not in family else 1
    flags = {
        "pipe_parallel_size": pipe,
        "sequence_parallel_size": sequence,
        "model_parallel_size": tensor,
        "ulysses_degree": 2 if sequence % 2 == 0 and tensor == 1 and number % 2 else 1,
        "per_device_train_batch_size": samples,
        "gradient_accumulation_steps": GLOBAL_BATCH // data // samples,
        "checkpoint_grad_interval": int(number % 4 == 1),
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    return given + ["--split_dlayer"] * (number // 2 % 2) + ["--checkpoint_grad_selective"] * (number % 4 == 3)


SHAPES = [shape for world in (1, 2, 4) for shape in factorisations(world)]
#: Of the layouts of eight ranks, which are many, these; and for whom all layouts would show nothing new, two or three.
EIGHT = {
    "llama": [(2, 2, 2, 1), (1, 4, 2, 1), (1, 2, 2, 2)],
    "qwen2-tied": [(2, 2, 1, 2)],
    "qwen2-moe": [(2, 1, 2, 2)],
}
#: Those where a family shows something that Llama does not; the others are thorough.
SOON = {
    "llama": [*SHAPES, (1, 2, 2, 2)],
    "mistral": [(1, 2, 1, 1)],
    "qwen2-tied": [(1, 1, 1, 2), (1, 2, 1, 1), (1, 2, 1, 2)],
    "qwen3": [(1, 2, 2, 1)],
    "qwen2": [(1, 1, 1, 2)],
    "qwen2-moe": [(1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 1, 1), (2, 1, 1, 2)],
    "qwen3-moe": [(1, 2, 1, 2)],
    "baichuan": [(1, 1, 2, 2)],
    "gpt_oss": [(1, 2, 2, 1)],
    "gemma3_text": [(1, 1, 2, 2)],
    "qwen3_next": [(2, 2, 1, 1)],
}
FEW = {
    "mistral": [(1, 2, 1, 1), (2, 1, 1, 2)],
    "qwen2": [(1, 1, 1, 2), (1, 1, 4, 1), (2, 2, 1, 1)],
    "qwen3": [(1, 1, 1, 4), (1, 1, 2, 2), (1, 2, 2, 1)],
    "qwen3-moe": [(1, 2, 1, 2), (1, 1, 2, 2)],
    "baichuan": [(1, 2, 2, 1), (1, 1, 2, 2), (1, 2, 1, 2)],
}


def layout_case(family: str, shape: tuple[int, int, int, int], number: int):
    """A family in a layout, by the options of this number."""
    case = pytest.param if shape in SOON.get(family, ()) else thorough
    return case(family, shape, layout_flags(family, shape, number), id=f"{family}-{'x'.join(map(str, shape))}")


#: Families go through the same layouts with different options.
CASES = [
    layout_case(family, shape, number + shift)
    for shift, family in enumerate(FAMILIES)
    for number, shape in enumerate(FEW.get(family, [*SHAPES, *EIGHT.get(family, ())]))
] + [
    pytest.param(
        "llama",
        (2, 2, 1, 1),
        [f"--partition_method={layers}", "--pipe_parallel_size=2", "--gradient_accumulation_steps=4", *more],
        id=f"llama-layers-{layers}",
    )
    # Stages of one parameter, embedding and head; and the attention that all others are compared with.
    for layers, *more in (("1,5",), ("5,1", "--attention=reference"))
]
#: A family for each thing that models of other families do, in layouts that could get it wrong.
MECHANISMS = [
    ("gpt_oss", (1, 1, 2, 1), 1),  # sinks, and windows shorter than documents, by Ulysses
    ("gpt_oss", (1, 2, 2, 1), 4),  # and in a ring
    ("deepseek_v3", (1, 2, 1, 2), 1),  # latent attention, biases of routers
    ("gemma3_text", (1, 1, 2, 2), 4),  # frequencies by type of layer, capped logits of a shared vocabulary
    ("qwen3_next", (2, 2, 1, 1), 1),  # linear attention
    ("mixtral", (1, 1, 2, 2), 1),  # weights under other names
    ("granite", (1, 2, 1, 2), 4),  # factors outside of layers
    ("phi", (1, 2, 2, 1), 1),  # a bias of the head
]
#: Those that train in every layout.
EVERYWHERE = tuple(FAMILIES)
FAMILIES |= {name: {"model_type": name, **small.NEEDS.get(name, {})} for name, _, _ in MECHANISMS}
FAMILIES["gpt_oss"]["sliding_window"] = 8
FAMILIES["granite"]["logits_scaling"] = 0.25  # gradients large enough to be clipped
CASES += [layout_case(family, shape, number) for family, shape, number in MECHANISMS]
CASES.append(
    pytest.param("qwen2-tied", (2, 2, 1, 1), LAYOUTS["pipe2-data2-offload"][2].split(), id="qwen2-tied-offload")
)
#: The stages of ZeRO that ``auto``, which the others have, would not take.
CASES += [
    pytest.param(family, shape, [*layout_flags(family, shape, 2), f"--zero_stage={stage}"], id=f"zero-{stage}-{name}")
    for stage, family, shape, name in (
        (0, "qwen2-tied", (2, 2, 1, 1), "pipe2-data2-tied"),
        (0, "qwen2-moe", (1, 1, 2, 2), "sequence2-tensor2-moe"),
        (1, "qwen2-tied", (1, 2, 1, 2), "pipe2-tensor2-tied"),
    )
]
#: Experts spread over ranks: alone, over data and sequence, over stages of which the last has none, cut besides.
CASES += [
    param(family, shape, [*layout_flags(family, shape, number), *more.split()], id=f"experts-{name}")
    for param, name, family, shape, number, more in (
        (pytest.param, "2-selective", "qwen3-moe", (2, 1, 1, 1), 3, "--expert_parallel_size=2"),
        (thorough, "4-zero-0", "qwen2-moe", (4, 1, 1, 1), 1, "--expert_parallel_size=4 --zero_stage=0"),
        (pytest.param, "4-data2-sequence2", "qwen3-moe", (2, 1, 2, 1), 2, "--expert_parallel_size=4"),
        (pytest.param, "2-pipe2", "qwen2-moe", (2, 2, 1, 1), 2, "--expert_parallel_size=2 --partition_method=7,2"),
        (thorough, "2-tensor2-zero-0", "qwen3-moe", (2, 1, 1, 2), 0, "--expert_parallel_size=2 --zero_stage=0"),
    )
]

#: Layers as graphs, all computed again, with sums over ranks in them; and with experts in balance, sinks and windows,
#: in rows of any length, in a ring.
CASES += [
    param(family, shape, [*layout_flags(family, shape, number), *more.split()], id=f"compiled-{family}")
    for param, family, shape, number, more in (
        (pytest.param, "llama", (1, 2, 1, 2), 5, "--compile"),
        (thorough, "gpt_oss", (1, 1, 2, 1), 4, "--compile --ragged --checkpoint_grad_selective"),
    )
]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Hugging Face directory of each family, in fp32."""
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            write_random_model(AutoConfig.for_model(**{**SMALL, **FAMILIES[family]}), made[family], seed=1)
        return made[family]

    return of


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """A small table to evaluate on."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, rng.integers(1, 90)).astype(np.int32) for _ in range(20)]
    return write_table(tmp_path_factory.mktemp("held-out") / "table", rows)


@pytest.fixture(scope="session")
def unfilled_tables(tmp_path_factory):
    """Flags of tables whose rows were packed to SEQ_LEN and left 0 to 63 tokens unused; samples for 4.6 steps."""
    rng, flags = np.random.default_rng(2), []
    for name, count in (("train_data", 5 * GLOBAL_BATCH - 3), ("eval_data", 7)):
        lengths = [[int(n) for n in rng.integers(1, 22, rng.integers(1, 4))] for _ in range(count - 1)] + [[SEQ_LEN]]
        rows = [rng.integers(0, VOCAB, sum(row)).astype(np.int32) for row in lengths]
        bounds = [[0, *np.cumsum(row).tolist()] for row in lengths]
        table = write_table(tmp_path_factory.mktemp("unfilled") / name, rows, cu_seqlens=bounds)
        files = tuple(FileInfo(p.name, 0, 0, p.stat().st_size) for p in sorted(table.glob("*.parquet")))
        commit(table, Manifest(files, count, sum(map(len, rows)), seq_len=SEQ_LEN))
        flags.append(f"--{name}={table}")
    return [*flags, "--max_steps=-1"]


@pytest.fixture(scope="session")
def reference(model_dir, ragged_table, held_out, tmp_path_factory):
    """What the plain loop does with a family's model."""
    known = {}

    def of(family: str, *extra: str):
        if (family, *extra) not in known:
            given = flags(model_dir(family), ragged_table, tmp_path_factory.mktemp("unused"), held_out)
            args = parse_arguments([*given, *extra, "--gradient_accumulation_steps", str(GLOBAL_BATCH)])
            known[(family, *extra)] = one_process(model_dir(family), args, plan_run(args, 1))
        return known[(family, *extra)]

    return of


def command(launcher: str, ranks: int) -> list[str]:
    port = str(free_port())
    return {
        "python": ["python", "-m", "fft.train"],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", port, "fft/train.py"],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port, "fft/train.py"],
    }[launcher]


def flags(model, table, output, held_out=None) -> list[str]:
    """AdamW's epsilon is such that the rounding of a gradient near zero is not blown up to a step."""
    return (
        f"--model {model} --train_data {table} --eval_data {held_out or table} --seq_len {SEQ_LEN} --max_steps {STEPS} "
        f"--learning_rate {LR} --min_learning_rate {LR / 2} --warmup_steps 2 --max_grad_norm {CLIP} "
        f"--adam_epsilon 1e-5 --dtype fp32 --seed 3 "
        f"--output_dir {output}/model --checkpoint {output}/run"
    ).split()


def read_metrics(run) -> tuple[list[dict], list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x["eval_loss"] for x in lines if "eval_loss" in x]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "pipe2"),
        thorough("qwen2-tied", "pipe2"),
        ("qwen2-tied", "pipe2-data2-offload"),
        thorough("llama", "sequence2"),
        ("qwen2-tied", "tensor2"),
    ],
)
def test_bf16_follows_fp32(family, layout, model_dir, ragged_table, held_out, reference, tmp_path):
    """bf16 keeps 8 bits: a loss may differ by some 2^-9 and a matrix must move as in fp32, but for its rounding."""
    _, ranks, extra = LAYOUTS[layout]
    given = [*flags(model_dir(family), ragged_table, tmp_path, held_out), *extra.split(), "--dtype", "bf16"]
    done = run_ranks(ranks, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = reference(family)
    steps, evaluated = read_metrics(tmp_path / "run")
    np.testing.assert_allclose([s["loss"] for s in steps], expected.losses, rtol=2e-3)
    np.testing.assert_allclose([s["grad_norm"] for s in steps], expected.norms, rtol=2e-2)
    np.testing.assert_allclose(evaluated, expected.evaluations, rtol=2e-3)
    start = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    for name in (name for name, value in expected.weights.items() if value.ndim == 2):
        ours, theirs = exported[name] - start[name].bfloat16(), expected.weights[name] - start[name]
        cosine = float(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
        assert cosine > 0.95, f"{name}: {cosine}"


@pytest.mark.slow
def test_bf16_of_experts_over_ranks(model_dir, ragged_table, held_out, tmp_path):
    """Its norm is counted by an optimizer of its own; the last stage has no experts. In fp32 routers choose others."""
    steps = []
    for layout in ("pipe2-data2", "pipe2-expert2"):
        output = tmp_path / layout
        given = [*flags(model_dir("qwen3-moe"), ragged_table, output, held_out), *LAYOUTS[layout][2].split()]
        done = run_ranks(4, *given, "--dtype", "bf16", "--partition_method", "4,2", "--max_steps", 1)
        assert done.returncode == 0, done.stderr[-3000:]
        steps.append(read_metrics(output / "run")[0][0])
    assert steps[1]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-6)
    assert steps[1]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-5)


def assert_is_one_process(output, expected):
    """Losses, norms, gradients and weights of a run whose last step was saved, and the model it wrote."""
    found = read_outcome(output / "run")
    assert faults(found, expected, LR) == []
    assert len(found.losses) == STEPS
    assert min(expected.norms) > CLIP  # clipping was at work
    if (output / "model" / adapter.CONFIG).is_file():
        stored = adapter.AdapterReader(output / "model")
        assert len(stored.names) == len(found.weights)
        exported = {name: stored.tensor(name) for name in found.weights}
    else:
        exported = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in found.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape", "extra"), CASES)
def test_layout_equals_one_process(family, shape, extra, model_dir, ragged_table, held_out, reference, tmp_path):
    given = [*flags(model_dir(family), ragged_table, tmp_path, held_out), *extra, "--save_steps", STEPS]
    done = run_ranks(int(np.prod(shape)), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_is_one_process(tmp_path, reference(family))


LORA = ["--lora_dim=3", "--lora_alpha=12"]
PAIRS = "--per_device_train_batch_size=2 --gradient_accumulation_steps=4"
DORA = [*LORA, "--use_dora", "--use_rslora", "--lora_dropout=0.2"]
PIPE2 = ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "trained", "layout"),
    [
        pytest.param("qwen2-tied", 2, LORA, [*PIPE2, "--partition_method=1,5"], id="lora-pipe2"),
        pytest.param("llama", 4, LORA, ["--model_parallel_size=2", "--gradient_accumulation_steps=4"], id="lora-2x2"),
        thorough(
            "qwen2",
            4,
            DORA,
            [*PIPE2, "--model_parallel_size=2", "--checkpoint_grad_interval=1"],
            id="dora-pipe2-tensor2",
        ),
        pytest.param(
            "qwen3",
            2,
            DORA,
            ["--sequence_parallel_size=2", *PAIRS.split(), "--ragged", "--checkpoint_grad_selective"],
            id="dora-sequence2",
        ),
        pytest.param(
            "qwen2-tied",
            2,
            ["--freeze=embed_tokens,layers.0,q_proj"],
            [*PIPE2, "--partition_method=2,4", "--checkpoint_grad_interval=1"],
            id="frozen-first-stage",
        ),
    ],
)
def test_part_of_the_parameters(family, ranks, trained, layout, model_dir, ragged_table, held_out, reference, tmp_path):
    """Adapters alone, or all but frozen parameters; the first stages of two pipelines have nothing to train."""
    given = [*flags(model_dir(family), ragged_table, tmp_path, held_out), *trained, *layout, "--save_steps", STEPS]
    done = run_ranks(ranks, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{'adapter' if trained in (LORA, DORA) else 'model'} written to {tmp_path / 'model'}\n" in done.stderr
    expected = reference(family, *trained)
    assert_is_one_process(tmp_path, expected)
    if trained not in (LORA, DORA):
        start = AutoModelForCausalLM.from_pretrained(model_dir(family)).state_dict()
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
        changed = {name for name, value in start.items() if not torch.equal(exported[name], value)}
        assert changed == set(expected.gradients)


RAGGED = {
    "pipe2-recompute": ("llama", 2, f"--pipe_parallel_size=2 {PAIRS} --checkpoint_grad_interval=1"),
    "pipe2-data2": ("qwen2-tied", 4, "--pipe_parallel_size=2 --gradient_accumulation_steps=4"),
    "pipe2-sequence2": ("llama", 4, f"--pipe_parallel_size=2 --sequence_parallel_size=2 {PAIRS}"),
    "pipe2-tensor2": (
        "llama",
        4,
        "--pipe_parallel_size=2 --model_parallel_size=2 --gradient_accumulation_steps=8 --checkpoint_grad_interval=1",
    ),
    # Stages that both receive and send.
    "pipe4-split": ("llama", 4, "--pipe_parallel_size=4 --gradient_accumulation_steps=8 --split_dlayer"),
    "experts-pipe2-sequence2": (
        "qwen2-moe",
        4,
        "--pipe_parallel_size=2 --sequence_parallel_size=2 --gradient_accumulation_steps=8",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "layout"),
    [
        (thorough if name in ("pipe2-sequence2", "pipe2-tensor2") else pytest.param)(*case, id=name)
        for name, case in RAGGED.items()
    ],
)
def test_ragged_micro_batches(family, ranks, layout, model_dir, unfilled_tables, reference, tmp_path):
    """Micro-batches of 16 to 64 (pairs: 128) tokens; some of the last step's and of the evaluation's are blank."""
    given = [*flags(model_dir(family), "_", tmp_path), *unfilled_tables, *layout.split(), "--save_steps", STEPS]
    done = run_ranks(ranks, *given, "--ragged")
    assert done.returncode == 0, done.stderr[-3000:]
    # The experts' balance is that of real tokens; in rows of a fixed length the unused ones count, too.
    assert_is_one_process(tmp_path, reference(family, *unfilled_tables, *["--ragged"] * ("moe" in family)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAUNCHED)
def test_started_by_a_launcher(layout, launch, model_dir, ragged_table, held_out, reference, tmp_path):
    launcher, ranks, extra = LAYOUTS[layout]
    given = [*flags(model_dir("llama"), ragged_table, tmp_path, held_out), *extra.split(), "--save_steps", STEPS]
    done = launch(*command(launcher, ranks), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < done.stderr.find("kernels: attention cpu\n") < done.stderr.find("step 0/")  # checked before it is used
    assert_is_one_process(tmp_path, reference("llama"))
