"""What one library's import does not find, others do."""

import sys

import pytest

from fft.hidden_modules import hidden_module


def test_a_module_is_hidden_from_those_that_are_imported_and_from_nobody_else(monkeypatch, tmp_path):
    for name in ("unknown_module", "known_module"):
        (tmp_path / f"{name}.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with hidden_module("unknown_module"), pytest.raises(ModuleNotFoundError):
        import unknown_module
    import known_module
    import unknown_module

    assert unknown_module.value == 1
    with hidden_module("known_module"):
        import known_module as again
    assert again is known_module
    assert sys.modules["known_module"] is known_module
