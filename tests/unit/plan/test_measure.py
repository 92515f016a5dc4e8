"""A machine as it is measured: what is fitted is found again, and its file is read as what was written."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from quick_measure import SMALL

from fft.errors import UserError
from fft.plan import device_rates
from fft.plan.__main__ import main as plan
from fft.plan.constants import FITTED_CONSTANTS
from fft.plan.device_rates import LinearTime, fitted_products
from fft.plan.hardware import HARDWARE, Device, Link, Machine, read_machine
from fft.plan.kernels import flash_time, product_time
from fft.plan.link_rates import ExchangeTime, LinkTimes, line
from fft.plan.measure import main
from fft.plan.measured import MeasuredMachine, between_link
from fft.plan.ours import ON_CPU, OURS, stack_on

CPU = Device("a processor, 1 thread a rank", 2e11, 0.9, 1e10, 12e9, (0.4, 0.3), 1e11, True, ((128.0, 1e10, 2e10),))
AT = replace(FITTED_CONSTANTS, stream=1.0, launch=2e-6, tile=17.0, chain=0.6, host=0.0)


def test_the_share_of_large_products_and_the_tile_are_found():
    def seconds(tokens, width):
        forward = product_time(CPU, tokens, width, width, AT)
        return 2 * forward + product_time(CPU, width, width, tokens, AT)

    times = [LinearTime(n, w, seconds(n, w)) for n, w in ((128, 512), (512, 512), (512, 1376), (2048, 1024))]
    reached, tile = fitted_products(CPU, times, AT)
    assert reached == pytest.approx(0.9, rel=0.03)
    assert tile == pytest.approx(17, rel=0.15)


def test_attention_takes_the_rate_of_its_length():
    device = replace(CPU, attention=((128.0, 1e10, 2e10), (512.0, 3e10, 5e10)))
    for row, forward, backward in ((64, 1e10, 2e10), (128, 1e10, 2e10), (256, 2e10, 3.5e10), (4096, 3e10, 5e10)):
        expected = 1e9 / forward + AT.launch, 2.5e9 / backward + AT.launch
        assert flash_time(device, 1e9, row, device.flash, AT) == pytest.approx(expected)
    half = flash_time(device, 1e9, 512, (device.flash[0] / 2, device.flash[1]), AT)
    assert half[0] == pytest.approx(2e9 / 3e10 + AT.launch)


def test_latency_and_bandwidth_are_found():
    latency, bandwidth = line([(size, 1e-3 + size / 1e8) for size in (64, 1 << 16, 1 << 20)])
    assert (latency, bandwidth) == pytest.approx((1e-3, 1e8), rel=1e-3)
    latency, bandwidth = line([(64, 1e-4), (1 << 16, 1e-4), (1 << 20, 1e-2), (1 << 24, 0.16)])  # a burst for nothing
    assert (latency, bandwidth) == pytest.approx((1e-4, 1e8), rel=0.1)


@pytest.fixture
def link():
    """Messages at 100 MB/s, sums at 80, gathers at 50, 200 us."""
    sizes = (64, 1 << 16, 1 << 20, 1 << 24)
    messages = tuple(ExchangeTime(size, 2e-4 + size / 1e8) for size in sizes)
    sums = tuple(ExchangeTime(size, 4e-4 + size / 8e7) for size in sizes)
    return LinkTimes(2, messages, sums, tuple(ExchangeTime(size, 2e-4 + size / 2 / 5e7) for size in sizes))


def test_a_file_is_read_as_what_was_written(link, tmp_path):
    between, at = between_link(link, 2, AT)
    assert between.bandwidth == pytest.approx(2e8, rel=1e-3)
    assert between.latency == pytest.approx(2e-4, rel=1e-2)
    assert (at.network, at.summing) == pytest.approx((0.5, 1.6), rel=1e-3)
    machine = Machine("2x a processor", CPU, 2, Link(5e9, 5e-5), between, at)
    products = [LinearTime(512, 512, 0.01)]
    path = tmp_path / "mine.yaml"
    path.write_text(MeasuredMachine(machine, "on here at noon", products, {"between": link}).text())
    read = read_machine(path)
    for part in ("device", "inside", "between", "at"):
        for name, written in vars(getattr(machine, part)).items():
            again = getattr(getattr(read, part), name)
            plain = isinstance(written, str | bool) or name == "attention"
            assert again == (written if plain else pytest.approx(written, rel=1e-3)), name
    assert "assumed" in path.read_text().split("inside:")[1].split("between:")[0]
    assert "assumed" not in path.read_text().split("between:")[1]
    assert stack_on(read.device) is ON_CPU
    assert stack_on(read_machine(HARDWARE / "8xa100-40g-pcie.yaml").device) is OURS


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"constants": {"speed": 1}}, "constants.speed is not known"),
        ({"constants": {"network": 0}}, "constants.network must be a number above 0"),
        ({"constants": {"host": -1}}, "constants.host must be a number of at least 0"),
        ({"kind": "abacus"}, "device.kind must be"),
        ({"attention": [[128, 0.1]]}, "device.attention must be a list of"),
    ],
)
def test_what_a_file_says_wrongly_is_refused(changed, words, tmp_path):
    said = yaml.safe_load((HARDWARE / "8xa100-40g-pcie.yaml").read_text())
    if "constants" not in changed:
        said["device"] |= changed
    else:
        said |= changed
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(said))
    with pytest.raises(UserError, match=words):
        read_machine(path)


def test_this_machine_is_measured_and_planned_for(monkeypatch, tmp_path, capsys):
    """In no time, so that figures are poor: that they are made, written, read and used."""
    for name, value in SMALL.items():
        monkeypatch.setattr(device_rates, name, value)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    path = tmp_path / "mine.yaml"
    assert main(["-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    machine = read_machine(path)
    assert machine.device.cpu
    assert machine.node == 1
    assert machine.at.stream == 1
    assert 1e8 < machine.device.peak < 1e13
    assert Path(path).read_text().count("assumed: start ranks on") == 2
    with pytest.raises(UserError, match="--overwrite"):
        main(["-o", str(path)])
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        main(["-o", str(tmp_path / "nowhere" / "mine.yaml")])
    run = ["--model", "conf/models/llama-3m.json", "--ranks", "2", "--seq_len", "512", "--tokens_per_step", "4096"]
    assert plan([*run, "--hardware", str(path), "--best", "1"]) == 0
    assert "tokens/s" in capsys.readouterr().out
