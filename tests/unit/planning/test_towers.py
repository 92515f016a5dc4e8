"""Layouts of models that see images: what towers cost and hold, which stages have them, what a dry run says of it."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tables import GRID_RULES, TILE_RULES, packed_rows, rows_table, write_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, small_config

from fft.arguments import parse_arguments
from fft.data.commits import commit
from fft.data.image_tallies import image_facts, tally_images
from fft.errors import UserError
from fft.models.carried import packed
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import write_random_model
from fft.models.layers import Embedding, pipeline_layers
from fft.models.spec import ModelSpec
from fft.models.vision import rules_of
from fft.parallel.mesh import mesh_sizes
from fft.planning.activations import layer_activations
from fft.planning.costs import TOWER, layer_costs, multiply_adds, planned_layers
from fft.planning.dry_run import dry_run
from fft.planning.image_load import ImageLoad, load_of, manifests_of
from fft.planning.layout import bubble_of, describe, plan_layout
from fft.planning.partition import stage_bounds
from fft.planning.tower_activations import SeenRow
from fft.weights.hf import WeightReader

CONF = Path(__file__).resolve().parents[3] / "conf"
QWEN2_VL = str(CONF / "models/qwen2-vl-7b.json")
SEED = (
    "--pipe_parallel_size=8 --encoder_pipe_parallel_size=2 --partition_method=11,2 --split_dlayer "
    "--checkpoint_grad_interval=1 --only_ckpt_model --max_num_checkpoints=2"
)


def seeing(family: str, dtype: torch.dtype = torch.float32, **options) -> ModelSpec:
    config = small_config(family)
    return ModelSpec(
        config, dtype, images=rules_of(config, TILE_RULES if family == "internvl" else GRID_RULES), **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_tower_are_those_torch_counts(family):
    made, tokens = seeing(family), 100
    tiles = family == "internvl"
    grids = torch.tensor([[3, 4, 4], [1, 4, 4]] if tiles else [[1, 8, 16], [1, 4, 8]])
    counts = [16] * 4 if tiles else [128, 32]
    load = ImageLoad(sum(counts) / tokens, sum(n * n for n in counts) / sum(counts), sum(counts))
    costs = [cost for cost in layer_costs(made, 64, load=load) if cost.kind in TOWER]
    ours = 2 * tokens * sum(cost.flops + cost.backward for cost in costs)
    model = AutoModelForImageTextToText.from_config(made.config, attn_implementation="eager")
    vision = made.images
    pixels = torch.randn(4, 3, 16, 16) if tiles else torch.randn(sum(counts), 3 * vision.temporal * vision.patch**2)
    with FlopCounterMode(display=False) as counter:
        if tiles:
            features = model.model.get_image_features(pixel_values=pixels).pooler_output
        else:
            features = model.model.visual(pixels, grid_thw=grids)
            features = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
        sum(part.sum() for part in features).backward()
    # Vectors count as if they were multiplied, much in so narrow a tower; less is attended to where windows end early.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family, tmp_path):
    """Of real layers; and what travels between stages is what is said to travel."""
    made, tokens = seeing(family), 64
    load = ImageLoad(2.0, 64.0, 112)
    row = SeenRow(made, load, 1, tokens, tokens)
    planned = layer_activations(made, tokens, images=row)
    kinds = [layer.kind for layer in planned_layers(made)]
    taken = row.taken(kinds)
    write_random_model(made.config, tmp_path, seed=0)
    builder = StageBuilder(made, weights=WeightReader(tmp_path))
    grid = [8, 4, 4] if family == "internvl" else [1, 2, 58]  # with the blank one
    count = int(np.prod(grid))
    places = torch.arange(count // 4 - 1, dtype=torch.int32)
    activations = (
        torch.randint(256, (count, 3 * made.images.patch**2), dtype=torch.uint8),
        torch.zeros(1, tokens, dtype=torch.int32),
        torch.tensor([0, *[tokens] * tokens], dtype=torch.int32),
        torch.arange(tokens, dtype=torch.int32).expand(3, tokens).contiguous(),
        torch.stack([torch.cat([places, places.new_tensor([-1])]), torch.arange(count // 4, dtype=torch.int32)]),
        torch.tensor([grid], dtype=torch.int32),
    )
    for number, layer in enumerate(pipeline_layers(builder)[:-1]):
        real, kept = layer.build(), {}
        floats = [x.detach().requires_grad_() for x in activations if x.is_floating_point()]
        if floats:
            assert packed(activations)[0].nbytes == taken[number].floats
        ints = sum(x.nbytes for x in activations[len(floats) :])
        assert ints == pytest.approx(taken[number].ints, abs=100)
        known = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *activations[len(floats) :])}

        def keep(tensor, kept=kept, known=known):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        activations = (*floats, *activations[len(floats) :])
        real(activations)  # what a stage computes once
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            activations = real(activations)
        if kinds[number] in TOWER[1:]:
            context = taken[number].context
            assert sum(kept.values()) == pytest.approx(planned[number].saved, abs=context + 2000), kinds[number]
        activations = tuple(x.detach() for x in activations)
    selective = replace(made, selective=True)
    less = layer_activations(selective, tokens, images=SeenRow(selective, load, 1, tokens, tokens))
    assert sum(layer.saved for layer in less[1:4]) < 0.9 * sum(layer.saved for layer in planned[1:4])


def test_who_runs_the_tower_takes_its_time():
    """A tower is not shared out over the ranks of a row, so that it takes more of their time than of one rank's."""
    made = seeing("qwen2_vl")
    args = parse_arguments(["--dry_run", "--model", "m", "--seq_len", "64", "--gradient_accumulation_steps", "4"])
    alone, both = (plan_layout(args, made, mesh_sizes(2, 1, size, 1), host=False) for size in (1, 2))
    for one, two in zip(alone.costs, both.costs, strict=True):
        assert two.time == one.time * (2 if one.kind in TOWER else 1)
        assert (two.flops, two.backward) == (one.flops, one.backward)


@pytest.mark.parametrize(
    ("frozen", "first"),
    [(r"visual\.", 6), (r"visual\.(?!merger)", 5), (r"visual\.patch_embed", 1), (r"visual\.,embed_tokens", 7)],
)
def test_what_is_frozen_of_a_tower(frozen, first):
    """Nothing is kept below the first layer that is trained, on the stage that receives nothing."""
    args = parse_arguments(["--dry_run", "--model", "m", "--seq_len", "64", "--freeze", frozen, "--image_tokens", "1"])
    every = parse_arguments(["--dry_run", "--model", "m", "--seq_len", "64", "--image_tokens", "1"])
    some, whole = (plan_layout(a, seeing("qwen2_vl"), mesh_sizes(1, 1, 1, 1), host=False) for a in (args, every))
    backward = multiply_adds(some.costs)[1]
    assert next(layer for layer, cost in enumerate(some.costs) if cost.trained) == first
    assert not any(backward[:first])
    assert [cost.kind for cost, adds in zip(some.costs, backward, strict=True) if not adds][first:] in ([], [Embedding])
    assert some.memory[0].activations < whole.memory[0].activations
    assert bubble_of(args, some) == 0


@pytest.mark.parametrize("flags", [[], ["--checkpoint_grad_interval", "1"], ["--freeze", r"visual\."]])
def test_a_shared_tower_is_held_by_all_and_encodes_before(flags):
    """Its FLOPs are those of a tower in stages; what it waits for is less."""
    given = ["--dry_run", "--model", "m", "--seq_len", "64", "--gradient_accumulation_steps", "8", *flags]
    args = parse_arguments([*given, "--pipe_parallel_size", "2"])
    staged = seeing("qwen3_vl", torch.bfloat16)
    shared = replace(staged, shared_tower=True)
    apart, both = (plan_layout(args, made, mesh_sizes(2, 2, 1, 1), host=False) for made in (staged, shared))
    assert (apart.tower, both.tower, len(both.shared)) == (6, 0, 6)
    assert apart.every == [*both.shared, *both.costs]
    assert 0 < bubble_of(args, both) < 1
    tower = sum(cost.held for cost in both.shared)
    per_value = 2 if flags[:1] == ["--freeze"] else 6
    held = [sum(cost.held for cost in both.costs[a:b]) for a, b in itertools.pairwise(both.bounds)]
    assert [memory.weights for memory in both.memory] == [6 * values + per_value * tower for values in held]
    said = describe(args, "qwen3_vl", both)
    assert "is shared: every rank has all of it" in said
    assert "encodes 1/2 of a step's images" in said


def even(*cut, tower: int = 6, encoder: int = 0, layers: int = 20) -> list[int]:
    method, stages = cut
    return stage_bounds(method, [1.0] * layers, [1] * layers, stages, lambda _, a, b: b - a, 0.0, tower, encoder)


def test_encoder_stages_share_the_tower():
    assert even("fast", 4, encoder=2) == [0, 3, 6, 13, 20]
    assert even("uniform", 3, encoder=1) == [0, 6, 13, 20]
    assert even("mem", 3, encoder=1)[:2] == [0, 6]
    assert even("parameters", 3, encoder=2)[:3] == [0, 3, 6]
    assert even("fast", 4) == [0, 5, 10, 15, 20]  # cut as one


def test_two_numbers_are_the_decoders_ends():
    assert even("4,2", 5, encoder=1) == [0, 6, 10, 14, 18, 20]
    assert even("11,3", 4, tower=0) == [0, 11, 14, 17, 20]
    assert even("8,6", 3, encoder=1) == [0, 6, 14, 20]  # all of the decoder's
    assert even("2,4,8,6", 4, encoder=2) == [0, 2, 6, 14, 20]  # all stages
    assert even("5,3,2,4", 5, encoder=1) == [0, 6, 11, 14, 16, 20]


@pytest.mark.parametrize(
    ("method", "stages", "encoder", "sentence"),
    [
        ("4,2", 4, 0, "names the layers of the decoder's first and last stage: say by --encoder_pipe_parallel_size"),
        ("8,7", 3, 1, "must name 2 positive counts .one a decoder stage. that sum to 14 layers"),
        ("8,5", 5, 1, "must name 4 positive counts .* or those of the first and the last, which leave 2 or more"),
        ("3,3,8,6", 4, 1, "the first 1 counts must sum to the vision tower's 6 layers"),
        ("fast", 2, 2, "--encoder_pipe_parallel_size 2 counts within --pipe_parallel_size 2: leave the decoder"),
        ("fast", 1, 1, "--encoder_pipe_parallel_size 1 counts within --pipe_parallel_size 1"),
        ("fast", 9, 7, "--encoder_pipe_parallel_size 7 is more than the vision tower's 6 layers"),
        ("fast", 17, 2, "leave the decoder 1 to 14 of the stages"),
    ],
)
def test_impossible_encoder_stages_are_refused(method, stages, encoder, sentence):
    with pytest.raises(UserError, match=sentence):
        even(method, stages, encoder=encoder)


def dry(*flags: str) -> None:
    assert dry_run(parse_arguments(["--dry_run", *flags])) == 0


def test_the_seeds_command_is_planned(capsys):
    dry("--model", QWEN2_VL, "--ranks", "8", *SEED.split(), "--seq_len", "2048")
    said = capsys.readouterr().out
    assert "qwen2_vl, 8.29 B parameters" in said
    rows = [line.split() for line in said.splitlines() if line.endswith(("tower", "decoder"))]
    assert [row[1] for row in rows] == ["0-16", "17-33", "34-44", *(row[1] for row in rows[3:7]), "91-92"]
    assert [row[-1] for row in rows] == ["tower"] * 2 + ["decoder"] * 6
    assert "images: 2.00 patches a token, at most 4,096 in a micro-batch, each sees 4,096; assumed" in said


def test_a_dry_run_has_a_tower_where_images_are_said_to_be(capsys, tmp_path):
    small = ("--seq_len", "64", "--ranks", "1")
    config = small_config("qwen2_vl", 400)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    dry("--init", "--model", str(tmp_path), *small)
    assert "images" not in capsys.readouterr().out
    dry("--init", "--model", str(tmp_path), *small, "--image_tokens", "0.25")
    assert "images: 1.00 patches a token, at most 64 in a micro-batch" in capsys.readouterr().out
    table = counted(tmp_path / "table", packed_rows(np.random.default_rng(0), GRID_RULES, 64, 9), 64)
    dry("--init", "--model", str(tmp_path), *small, "--train_data", table)
    assert "as the tables' manifests count them" in capsys.readouterr().out
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "part-0.parquet").write_bytes(b"")  # never opened
    dry("--init", "--model", str(tmp_path), *small, "--train_data", str(texts))
    assert "images" not in capsys.readouterr().out
    for flags, sentence in (
        (("--encoder_pipe_parallel_size", "1", "--train_data", str(texts)), "--train_data has no images"),
        (("--image_tokens", "0"), "--image_tokens 0.0 must be a share, more than 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            dry("--init", "--model", str(tmp_path), *small, *flags)


@pytest.mark.parametrize(("flag", "value"), [("image_tokens", "0.5"), ("encoder_pipe_parallel_size", "1")])
def test_models_of_texts_have_no_tower(flag, value):
    with pytest.raises(UserError, match=f"--{flag}.*: a llama (has no vision tower|sees no images)"):
        dry("--model", str(CONF / "models/llama-3m.json"), f"--{flag}", value)


def counted(folder: Path, rows: list, seq_len: int | None) -> str:
    """A table whose manifest counts its images, as the jobs'."""
    table = rows_table(rows)
    opened = write_rows(folder, table, GRID_RULES, seq_len)
    facts = {"counts": {"vision": image_facts(tally_images(table), GRID_RULES.merge)}}
    commit(folder, replace(opened.manifest, lineage=facts))
    return str(folder)


def test_what_tables_say_of_their_images(tmp_path):
    rows = packed_rows(np.random.default_rng(1), GRID_RULES, 64, 40)
    sizes = [[h * w for one in row for _, h, w in one.grids] for row in rows]
    patches, squares = sum(map(sum, sizes)), sum(n * n for row in sizes for n in row)
    packed_table, loose = (counted(tmp_path / str(n), rows, n) for n in (64, None))
    tokens = sum(len(one.ids) for row in rows for one in row)

    def load(data: str, *flags: str) -> ImageLoad:
        args = parse_arguments(["--dry_run", "--model", "m", "--train_data", data, "--seq_len", "64", *flags])
        return load_of(args, GRID_RULES, manifests_of(data))

    found = load(packed_table)
    assert (found.per_token, found.seen, found.known) == (patches / (40 * 64), squares / patches, True)
    assert max(map(sum, sizes)) <= found.most <= min(256, 2 * max(map(sum, sizes)))
    assert load(packed_table, "--ragged").per_token == patches / tokens
    assert load(loose) == ImageLoad(patches / tokens, squares / patches, 256, True)
    texts = write_rows(tmp_path / "texts", rows_table(rows).select(["input_ids"]), GRID_RULES).path
    half = load(f"{packed_table}:1 {texts}:3")
    assert half.per_token == pytest.approx(found.per_token / 4)
    assert half.seen == pytest.approx(found.seen)
    uncounted = write_rows(tmp_path / "uncounted", rows_table(rows), GRID_RULES, 64).path
    assert load(uncounted) == ImageLoad(2.0, 256.0, 256)
    assert load(f"{packed_table} {uncounted}").known is False
