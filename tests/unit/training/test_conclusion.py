"""What a run says at its end."""

from types import SimpleNamespace

import pytest

from fft.arguments import parse_arguments
from fft.training.conclusion import _next


@pytest.mark.parametrize(("flags", "serves"), [((), True), (("--use_rslora",), True), (("--use_dora",), False)])
def test_an_adapter_that_vllm_does_not_run_is_only_to_be_merged(flags, serves):
    given = ["--model", "m", "--train_data", "t", "--output_dir", "o", "--lora_dim", "4", *flags]
    told = _next(parse_arguments(given), SimpleNamespace(tokenizer="m"))
    assert told[0].startswith("python -m fft.checkpoint.convert m MERGED --lora o")
    assert any("fft.serve.server" in line for line in told) == serves
