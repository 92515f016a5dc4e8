"""An operator that is compiled on first use, by a compiler that is none."""

import os
import signal
import subprocess
import sys

import pytest
from torch.utils import cpp_extension

from fft.training.compiling import compile_alone

#: Marks the folder as torch does, and is killed while it compiles.
KILLED = """
import os, signal
from pathlib import Path
from torch.utils import cpp_extension
from fft.training.compiling import compile_alone
def load():
    Path(cpp_extension._get_build_directory("op", False), "lock").touch()
    os.kill(os.getpid(), signal.SIGKILL)
compile_alone("op", load)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_what_a_killed_compiler_leaves_is_not_waited_for(capsys):
    done = subprocess.run([sys.executable, "-c", KILLED], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    mark = os.path.join(cpp_extension._get_build_directory("op", False), "lock")
    assert os.path.exists(mark)
    compile_alone("op", lambda: print("there" if os.path.exists(mark) else "gone"))
    assert capsys.readouterr().out == "gone\n"


def test_a_compiler_that_lives_is_waited_for_and_named(tmp_path):
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    code = (
        "import time, pathlib, sys; from fft.training.compiling import compile_alone\n"
        "begun, go_on = map(pathlib.Path, sys.argv[1:])\n"
        "def load():\n  begun.touch()\n  while not go_on.exists(): time.sleep(0.01)\n"
        "compile_alone('op', load)"
    )
    with subprocess.Popen([sys.executable, "-c", code, begun, go_on], env=dict(os.environ)) as first:
        while not begun.exists():
            assert first.poll() is None
        second = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "second", go_on],
            env=dict(os.environ),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "waiting for another process, which compiles op" in second.stderr.readline()
        assert not (tmp_path / "second").exists()
        go_on.touch()
        assert second.wait(300) == 0
        second.stderr.close()
        assert (tmp_path / "second").exists()
