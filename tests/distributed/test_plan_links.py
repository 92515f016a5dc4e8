"""Links between machines made of namespaces are measured to be what they are shaped to."""

import json
from dataclasses import replace

import pytest
from forked import started

from benchmarks.hosts import Hosts, why_not
from benchmarks.plan_links import read_times
from fft.plan.constants import FITTED_CONSTANTS
from fft.plan.exchanges import Group, reduce_time, send_time
from fft.plan.hardware import HARDWARE, read_machine
from fft.plan.measured import between_link

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no namespaces here: {why_not()}")]

#: Bits a second: far below what two cores send.
RATE = 50e6


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    """Of a shaped link, by a rank on each side."""
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        hosts.shape(RATE, burst=16_000)
        with started(2, 1 << 20, module="benchmarks.plan_links", hosts=hosts) as (processes, streams):
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0, 0], streams[1].read_text()
            return read_times(json.loads(streams[0].read_text()))


def test_a_shaped_link_is_measured(times):
    for latency, bandwidth in (times.message, times.summing):
        assert 0.6 * RATE / 8 < bandwidth < 1.05 * RATE / 8  # others may use this machine's cores, nobody its links
        assert latency < 0.1


def test_what_was_measured_is_predicted(times):
    link, at = between_link(times, 1, FITTED_CONSTANTS)
    machine = replace(read_machine(HARDWARE / "8xa100-40g-pcie.yaml"), node=1, between=link)
    largest = times.sums[-1]
    assert reduce_time(machine, Group(2, 1, 1), largest.size, at) == pytest.approx(largest.seconds, rel=0.3)
    assert send_time(machine, times.messages[-1].size, 1, at) == pytest.approx(times.messages[-1].seconds, rel=0.3)
