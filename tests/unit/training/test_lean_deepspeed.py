"""What DeepSpeed's import does not find, others do."""

import sys

import pytest

from fft.training.lean_deepspeed import _hidden


def test_a_module_is_hidden_from_those_that_are_imported_and_from_nobody_else(monkeypatch, tmp_path):
    for name in ("hidden_module", "known_module"):
        (tmp_path / f"{name}.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with _hidden("hidden_module"), pytest.raises(ModuleNotFoundError):
        import hidden_module
    import hidden_module
    import known_module

    assert hidden_module.value == 1
    with _hidden("known_module"):
        import known_module as again
    assert again is known_module
    assert sys.modules["known_module"] is known_module
