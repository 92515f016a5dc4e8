"""A run's folder: taken under its lock, and looked at once more when it is."""

import contextlib

import pytest
import torch.distributed as dist

from fft.arguments import parse_arguments
from fft.checkpoint.run import LocalRun
from fft.errors import UserError
from fft.training import run_folder


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
