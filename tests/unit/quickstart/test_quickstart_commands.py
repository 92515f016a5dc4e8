"""What is the same of all quickstarts' commands."""

import pytest

from fft.errors import UserError
from fft.quickstart import __main__ as texts
from fft.quickstart import commands
from fft.quickstart.chat import __main__ as chats
from fft.quickstart.vision import __main__ as pictures

ALL = pytest.mark.parametrize("quickstart", [texts, chats, pictures], ids=["texts", "chats", "pictures"])


@ALL
def test_a_folder_of_something_else_is_left_alone(quickstart, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else than a quickstart"):
        quickstart.main(["--output", str(tmp_path)])


@ALL
def test_an_interrupt_is_no_traceback(quickstart, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_stages", interrupt)
    assert quickstart.main(["--output", str(tmp_path / "out")]) == 130
    assert "goes on with the stage that was running" in capsys.readouterr().err
