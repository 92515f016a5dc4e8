import sys

import pytest

from fft.errors import UserError
from fft.quickstart.stages import Stage, clock, run_command, run_stages


class Bench:
    """Two stages, the second fed by the first, that count how often they work."""

    def __init__(self, folder):
        self.folder, self.worked, self.said, self.flag = folder, [], [], "1"
        (folder / "source").write_text("a")

    def stage(self, name, source, target):
        def work():
            self.worked.append(name)
            (self.folder / target).mkdir(exist_ok=True)
            (self.folder / target / "result").write_text((self.folder / source).read_text() + name)
            return {"length": len(name)}

        command = ("make", name, self.flag if name == "second" else "")
        return Stage(name, command, (self.folder / source,), (self.folder / target,), work)

    def run(self):
        self.worked.clear()
        self.said.clear()
        stages = [self.stage("first", "source", "one"), self.stage("second", "one/result", "two")]
        return run_stages(stages, self.folder / "records", self.said.append)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_second_call_reuses_everything(bench):
    first = bench.run()
    assert bench.worked == ["first", "second"]
    assert bench.said[0].startswith("[1/2] first ...")
    assert bench.run() == first
    assert bench.worked == []
    assert ["already done" in line for line in bench.said] == [True, True]
    assert first["second"].facts == {"length": 6}


def test_a_changed_input_runs_the_stage_and_what_follows(bench):
    bench.run()
    (bench.folder / "source").write_text("bb")
    bench.run()
    assert bench.worked == ["first", "second"]


def test_a_changed_command_runs_only_its_stage(bench):
    bench.run()
    bench.flag = "2"
    bench.run()
    assert bench.worked == ["second"]


@pytest.mark.parametrize("damage", ["remove", "edit", "record"])
def test_a_damaged_result_is_made_again(bench, damage):
    bench.run()
    result = bench.folder / "two" / "result"
    if damage == "remove":
        result.unlink()
    elif damage == "edit":
        result.write_text("something else")
    else:
        (bench.folder / "records" / "second.json").write_text('{"command": [')
    bench.run()
    assert bench.worked == ["second"]
    assert result.read_text() == "afirstsecond"


def test_an_interrupted_stage_is_not_finished(bench):
    def fail():
        raise UserError("no")

    stages = [bench.stage("first", "source", "one"), Stage("second", ("x",), (), (), fail)]
    for expected in (["first"], []):
        bench.worked.clear()
        with pytest.raises(UserError, match="no"):
            run_stages(stages, bench.folder / "records", bench.said.append)
        assert bench.worked == expected


def test_a_failing_command_is_one_sentence(tmp_path, capfd):
    command = [sys.executable, "-c", "import os, sys; print(os.environ['SEEN']); sys.exit(3)"]
    with pytest.raises(UserError, match=r"stage train failed: `.*` ended with exit code 3"):
        run_command("train", command, tmp_path, {"SEEN": "variables arrive"})
    captured = capfd.readouterr()
    assert "variables arrive" in captured.err
    assert captured.out == ""
    with pytest.raises(UserError, match="no-such-program is not installed: run make env"):
        run_command("train", ["no-such-program"], tmp_path, {})


def test_clock():
    assert [clock(s) for s in (0.2, 83.2, 3600)] == ["0:00", "1:23", "60:00"]
