"""What is the same of both quickstarts' commands."""

import pytest

from fft.errors import UserError
from fft.quickstart import __main__ as texts
from fft.quickstart.vision import __main__ as pictures

BOTH = pytest.mark.parametrize("quickstart", [texts, pictures], ids=["texts", "pictures"])


@BOTH
def test_a_folder_of_something_else_is_left_alone(quickstart, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else than a quickstart"):
        quickstart.main(["--output", str(tmp_path)])


@BOTH
def test_an_interrupt_is_no_traceback(quickstart, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run_stages", interrupt)
    assert quickstart.main(["--output", str(tmp_path / "out")]) == 130
    assert "goes on with the stage that was running" in capsys.readouterr().err
