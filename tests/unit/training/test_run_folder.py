"""A run's folder: taken under its lock, and looked at once more when it is."""

import contextlib
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fft.arguments import parse_arguments
from fft.checkpoint.run import LocalRun
from fft.errors import UserError
from fft.parallel.mesh import MeshSizes
from fft.training import run_folder
from fft.training.early_stop import EarlyStop


def test_a_run_that_has_come_and_gone_meanwhile_is_not_replaced(tmp_path):
    """Two that start together both find the folder free; the second gets its lock when the first has ended."""
    given = ["--model", "m", "--train_data", "t", "--checkpoint", str(tmp_path)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.ExitStack() as held:
            start = run_folder.enter([LocalRun(tmp_path)], parse_arguments(given), None, dist.group.WORLD, held, print)
            assert start == run_folder.Start()
        (tmp_path / "metrics.jsonl").touch()
        with contextlib.ExitStack() as held, pytest.raises(UserError, match="exists and is not empty: choose another"):
            run_folder.enter([LocalRun(tmp_path)], parse_arguments(given), None, dist.group.WORLD, held, print)
        with contextlib.ExitStack() as held:
            run_folder.enter(
                [LocalRun(tmp_path)], parse_arguments([*given, "--overwrite"]), None, dist.group.WORLD, held, print
            )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "changed",
    [["--dpo_beta", "0.5"], ["--dpo_length_normalized"], ["--dpo_sft_weight", "1"], ["--lora_dropout", "0.5"]],
)
def test_a_resumed_run_is_told_of_another_loss_and_keeps_no_best_of_two(changed):
    given = ["--model", "m", "--train_data", "t", "--output_dir", "o", "--objective", "dpo", "--lora_dim", "4"]
    plan = SimpleNamespace(mesh=MeshSizes(1, 1), train=None, evaluations={}, images=None, identity={})
    state = run_folder.state_of(parse_arguments(given), plan, 1, None, None, EarlyStop(0))
    told: list[str] = []
    run_folder._compare(parse_arguments(given), plan, "step-1", state, told.append)
    assert not told
    run_folder._compare(parse_arguments([*given, *changed]), plan, "step-1", state, told.append)
    assert [line.split(" is ")[0] for line in told] == [f"warning: {changed[0]}"]
    keeps = [*given, *changed, "--checkpoint", "c", "--save_steps", "1", "--max_num_checkpoints", "1", "--best_of", "1"]
    keeps += ["--eval_data", "e"]
    if changed[0] == "--lora_dropout":  # of training alone
        run_folder._compare(parse_arguments(keeps), plan, "step-1", state, told.append)
    else:
        with pytest.raises(UserError, match=f"{changed[0]} .*: it was .* in step-1, and losses that it is part of"):
            run_folder._compare(parse_arguments(keeps), plan, "step-1", state, told.append)
