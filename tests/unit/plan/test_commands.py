"""The commands: what they print, what they write, what they refuse."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import pytest

from fft.errors import UserError
from fft.plan.__main__ import main
from fft.plan.constants import FITTED_CONSTANTS
from fft.plan.found import find_layouts
from fft.plan.hardware import HARDWARE, read_machine
from fft.plan.kernels import flash_time, product_time
from fft.plan.ours import OURS
from fft.plan.run import PlannedRun, Sides
from fft.plan.shape import Shape, Sizes, decoder
from fft.plan.step import layer_times, predict
from fft.plan.validate import main as validate
from fft.plan.validate import predicted, rank_correlation, read_published

FEW = Path(__file__).with_name("published_few.csv")
RUN = ["--model", "conf/models/llama-3m.json", "--ranks", "4", "--seq_len", "512", "--tokens_per_step", "4096"]
MACHINE = ["--hardware", str(HARDWARE / "8xa100-40g-pcie.yaml")]


def test_best_layouts_are_printed_written_and_drawn(tmp_path, capsys):
    settings, picture = tmp_path / "mine.yaml", tmp_path / "step.svg"
    more = [
        "--write",
        str(settings),
        "--timeline",
        str(picture),
        "--train_tokens",
        "1e9",
        "--price",
        "2",
        "--best",
        "3",
    ]
    assert main([*RUN, *MACHINE, *more, "--compare", "nvlink,pcie"]) == 0
    said = capsys.readouterr().out
    for words in ("tokens/s", "where the time goes", "pcie slower %", "per billion tokens", "longest row", "days"):
        assert words in said
    ElementTree.parse(picture)
    from fft.arguments import parse_arguments
    from fft.planning.dry_run import planned

    arguments = parse_arguments(["--config", str(settings), "--dry_run"])
    layout, _ = planned(arguments, arguments.ranks)
    assert layout.mesh.world == 4
    assert max(stage.total for stage in layout.memory) < 40e9
    with pytest.raises(UserError, match="--overwrite"):
        main([*RUN, *MACHINE, *more])
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        main([*RUN, *MACHINE, "--write", str(settings.parent / "nowhere" / "settings.yaml")])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("node: 8", "device is missing"),
        ("[1, 2]", "device, node, inside and between"),
        ("a: [", "no YAML"),
        ("device: {tflops: 1, speed: 2}", "device.speed is not known"),
        ("device: {tflops: -1}", "device.tflops must be a number above 0"),
    ],
)
def test_files_that_are_no_machines_are_refused(tmp_path, said, words):
    path = tmp_path / "machine.yaml"
    path.write_text(said)
    with pytest.raises(UserError, match=words):
        read_machine(path)


@pytest.mark.parametrize(
    ("was", "is_", "words"),
    [
        ("tflops: [0-9.]+", "tflops: .nan", "device.tflops must be a number above 0, not nan"),
        ("memory: [0-9.]+", "memory: .inf", "device.memory must be a number above 0, not inf"),
        ("reached: [0-9.]+", "reached: 62", "device.reached is a share, such as 0.8, not 62"),
        ("flash_forward: [0-9.]+", "flash_forward: 45", "device.flash_forward is a share"),
        ("sharing: [0-9.]+", "sharing: 0.5", "inside.sharing must be a number above 0 and whole, not 0.5"),
        ("node: [0-9]+", "node: true", "node must be how many devices"),
        ("name:", "name: \xff", "cannot be read"),
    ],
)
def test_numbers_of_which_nothing_can_be_predicted_are_refused(tmp_path, was, is_, words):
    """They were taken, and every prediction was no number, or many times too fast."""
    given = (HARDWARE / "8xa100-40g-pcie.yaml").read_text(encoding="utf-8")
    changed, count = re.subn(was, is_, given, count=1)
    assert count
    (path := tmp_path / "machine.yaml").write_bytes(changed.encode("latin-1", "replace"))
    with pytest.raises(UserError, match=words):
        read_machine(path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*MACHINE, "--tokens_per_step", "1000"], "multiple of --seq_len"),
        (["--hardware", "nowhere.yaml"], "nowhere.yaml"),
        ([*MACHINE, "--compare", "nvlink"], "two links"),
        ([*MACHINE, "--price", "nan"], "--price nan: it must be a number"),
        ([*MACHINE, "--train_tokens", "-5"], "--train_tokens is -5.0: it must be a number of tokens, or 0"),
        ([*MACHINE, "--compare", "nvlink,string"], "string"),
        ([*MACHINE, "--model", "conf/models/qwen2.5-72b.json", "--best", "1"], "has the memory"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        main([*RUN, *flags])


@pytest.mark.parametrize(
    "wrong", [{"ranks": 0}, {"ranks": 2.5}, {"seq_len": 0}, {"tokens_per_step": -512}, {"best": 0}]
)
def test_numbers_that_the_shell_refuses_are_refused_in_python(wrong):
    given = {"ranks": 4, "seq_len": 512, "tokens_per_step": 4096, **wrong}
    with pytest.raises(UserError, match=f"`{min(wrong)}` is .*: it must be a whole number from 1 on"):
        find_layouts("conf/models/llama-3m.json", MACHINE[1], **given)


def test_all_machines_are_read_and_are_near_their_datasheets():
    machines = [read_machine(path) for path in HARDWARE.glob("*.yaml") if path.name != "links.yaml"]
    assert len(machines) >= 11
    for machine in machines:
        assert 1e14 < machine.device.peak < 3e15
        assert 0.5 < machine.device.reached < 1
        assert machine.inside.bandwidth > 1e9
        assert machine.between.bandwidth > 1e9


def test_published_runs_are_predicted(capsys):
    assert validate([str(FEW)]) == 0
    said = capsys.readouterr().out
    assert "the trustworthy rest" in said
    assert "rank correlation" in said
    assert "constants were fitted on 0 of" in said
    errors = {row["id"]: predicted(row) for row in read_published(FEW)}
    for name, row in errors.items():
        if row.error is not None:
            assert abs(row.error) < 0.13, (name, row.error)
    assert abs(errors["msswift-01"].memory_error) < 0.12


def test_tables_that_are_none_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no table of published runs"):
        read_published(path)
    rows = read_published(FEW)
    rows[0]["layers"] = "many"
    with pytest.raises(UserError, match=rows[0]["id"]):
        predicted(rows[0])


def test_ranks_are_correlated():
    assert rank_correlation([(1, 2), (2, 3), (3, 9)]) == 1
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == -1


@pytest.mark.parametrize(("layers", "measured"), [(8, 1.6782), (32, 5.7555)])
def test_a_step_on_an_h200_is_predicted(layers, measured):
    """As docs/metal-h200.json has it: Llama-3-8B's layers, rows of 8,192, seven micro-batches on one device."""
    sizes = Sizes(4096, 32, 8, 128, 14336, True)
    shape = Shape("8B", 4096, 32, 8, 128, 128256, False, (decoder(sizes),) * layers)
    machine = read_machine(HARDWARE / "8xh200-141g-sxm.yaml")
    run = PlannedRun(machine, shape, Sides(), OURS, 8192, 1, 7, at=FITTED_CONSTANTS)
    assert predict(run).seconds == pytest.approx(measured, rel=0.1)
    head = layer_times(run)[-1]
    assert head.forward.seconds + head.backward.seconds == pytest.approx(0.0409, rel=0.1)


def test_layers_and_attention_on_an_h200_are_predicted():
    """The single figures of the same file; but for a product of 523 rows, which is better than predicted."""
    parts = json.loads((HARDWARE.parents[1] / "docs" / "metal-h200.json").read_text())["parts"]
    machine = read_machine(HARDWARE / "8xh200-141g-sxm.yaml")
    shape = Shape("8B", 4096, 32, 8, 128, 14336, False, (decoder(Sizes(4096, 32, 8, 128, 14336, True)),))
    pairs = []
    for name, fused in (("fused", True), ("eager", False)):
        stack = replace(OURS, fused_norms=fused, fused_inner=fused, accumulated=0.0)
        layer = layer_times(PlannedRun(machine, shape, Sides(), stack, 8192, 1, 1))[1]
        (row,) = parts["step"][f"8B, 8192 tokens, {name}"]["rows"]
        pairs.append((layer.forward.seconds, row["forward ms"]))
        pairs.append((layer.forward.seconds + layer.backward.seconds, row["both ms"]))
    for tokens in (1024, 4096, 8192, 32768):
        row = parts["attention"][f"documents of {tokens}"]["rows"][0]
        flops = row["forward ms"] * row["forward TFLOP/s"] * 1e9
        passes = flash_time(machine.device, flops, tokens, machine.device.flash, machine.at)
        pairs += zip(passes, (row["forward ms"], row["backward ms"]), strict=True)
    for row in parts["loss"]["products, 8192 x 4096 x 128256"]["rows"][1:]:
        pairs.append((product_time(machine.device, int(row["tokens"]), 128256, 4096, machine.at), row["ms"]))
    errors = [abs(1e3 * seconds / measured - 1) for seconds, measured in pairs]
    assert len(errors) == 14
    assert max(errors) < 0.1
    assert median(errors) < 0.05


def test_a_run_takes_the_best_layout(capsys):
    from fft.arguments import parse_arguments
    from fft.plan.auto import with_best_layout

    flags = ["--dry_run", "--model", "conf/models/llama-3m.json", "--seq_len", "512", "--layout", "auto"]
    given = parse_arguments([*flags, *MACHINE, "--tokens_per_step", "8192"])
    found = with_best_layout(given, 4, True)
    sizes = found.pipe_parallel_size * found.model_parallel_size * found.sequence_parallel_size
    assert 4 % sizes == 0
    assert found.gradient_accumulation_steps * found.per_device_train_batch_size * 512 * (4 // sizes) == 8192
    assert "predicted" in capsys.readouterr().err
    for wrong, words in ((["--tokens_per_step", "8000"], "multiple of"), (["--lora_dim", "4"], "--lora_dim")):
        with pytest.raises(UserError, match=words):
            with_best_layout(parse_arguments([*flags, *MACHINE, *wrong]), 4, True)
    with pytest.raises(UserError, match="needs --hardware"):
        with_best_layout(parse_arguments(flags), 4, True)
