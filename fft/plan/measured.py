"""A machine, measured by the ranks that run there: its devices, the links between them, as a file of conf/hardware."""

import os
import platform
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from fft.errors import UserError
from fft.files import write_atomically
from fft.parallel import interfaces
from fft.parallel.groups import own_group, tell_all
from fft.plan.constants import Constants
from fft.plan.device_rates import LinearTime, Timer, device_of
from fft.plan.hardware import Device, Link, Machine
from fft.plan.link_rates import LinkTimes, link_times

#: What is assumed of links that were not measured.
_ASSUMED = {"inside": Link(5e9, 50e-6), "between": Link(1.25e9, 50e-6)}
#: Constants that are measured, with what they say.
_CONSTANTS = {
    "stream": "bandwidth above is what was reached",
    "launch": "s of a kernel with next to no work; 0 of a device that is the host",
    "tile": "rows at which a product reaches half of its rate; fitted on the sizes above",
    "chain": "of operators on activations, for a byte of memory's bandwidth",
    "host": "s of a layer's forward with next to no work",
    "network": "gathers between machines, of the bandwidth of messages",
    "summing": "all-reduces, of the bandwidth of gathers",
    "wire": "bandwidth above is that of messages",
}


def measure_to(output: Path) -> None:
    """Measure this machine, and write what was found, by rank 0. Collective."""
    device = _join()
    try:
        found = measured_machine(device)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_atomically(output, found.text())
            print(f"{output}: {found.machine.name}, {found.source}\n{found.text()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> torch.device:
    """Join the launcher's ranks, if there is one, and take this rank's device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found is None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        device, backend = torch.device("cpu"), "gloo"
    else:
        device = torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device)
        backend = f"cpu:gloo,{found.type}:{dist.get_default_backend_for_device(device)}"
    if "RANK" in os.environ:
        if interfaces.CHOSEN not in os.environ:
            interfaces.listen_on(interfaces.address_towards(os.environ["MASTER_ADDR"]))
        dist.init_process_group(backend)
    return device


@dataclass(frozen=True)
class MeasuredMachine:
    """A machine, where its figures are from, and more of what was measured: products by size, and links by kind."""

    machine: Machine
    source: str
    products: list[LinearTime]
    links: dict[str, LinkTimes]

    def text(self) -> str:
        """As a file of conf/hardware."""
        machine, device, at = self.machine, self.machine.device, asdict(self.machine.at)
        sizes = ", ".join(f"{one.tokens} x {one.width}^2 {one.rate / 1e12:.4g}" for one in self.products)
        lines = [
            f"# Measured, but for what is said to be assumed: {self.source}.",
            f"name: {machine.name}",
            f"node: {machine.node}  # ranks of a machine",
            "",
            "device:",
            f"  name: {device.name}",
            f"  kind: {'cpu' if device.cpu else 'npu' if 'npu' in device.name.lower() else 'gpu'}",
            f"  tflops: {_number(device.peak / 1e12)}  # bf16, the highest of linear layers, no datasheet: {sizes}",
            f"  tflops_fp32: {_number(device.wide / 1e12)}  # the same layers in fp32",
            f"  reached: {_number(device.reached)}  # by large products; fitted on those sizes",
            f"  bandwidth: {_number(device.bandwidth / 1e9)}  # GB/s; sums of large tensors",
            f"  memory: {_number(device.memory / 1e9)}  # GB of a rank",
            f"  flash_forward: {_number(device.flash[0])}  # of tflops; the trainer's kernel for this device",
            f"  flash_backward: {_number(device.flash[1])}  # the same",
            f"  attention: {[[int(n), *(float(_number(x / 1e12)) for x in rates)] for n, *rates in device.attention]}"
            "  # TFLOP/s in forward and backward, by the tokens of a document",
        ]
        for kind, link in (("inside", machine.inside), ("between", machine.between)):
            lines += ["", f"{kind}:", *self._link(kind, link)]
        lines += ["", "constants:  # in place of those that hold for all machines (docs/planner.md)"]
        lines += [f"  {name}: {_number(at[name])}  # {_CONSTANTS[name]}" for name in self.constants]
        return "\n".join(lines) + "\n"

    @property
    def constants(self) -> list[str]:
        """Names of those that were measured."""
        names = ["stream", "launch", "tile", "host"] + (["chain"] if self.machine.device.cpu else [])
        return names + (["network", "summing", "wire"] if "between" in self.links else [])

    def _link(self, kind: str, link: Link) -> list[str]:
        where = "a device in one direction" if kind == "inside" else "a whole node in one direction"
        said = f"{where}; assumed: start ranks on {'one machine' if kind == 'inside' else 'two machines'} to measure it"
        if (times := self.links.get(kind)) is not None:
            told = "; ".join(
                f"{what} of {', '.join(f'{_bytes(one.size)} {1e3 * one.seconds:.3g} ms' for one in kinds)}"
                for what, kinds in (
                    ("messages both ways", times.messages),
                    ("all-reduces", times.sums),
                    ("all-gathers", times.gathers),
                )
            )
            said = f"{where}, of {'all-reduces' if kind == 'inside' else 'messages'}: {told}"
        rate, latency = link.bandwidth / 1e9, link.latency * 1e6
        return [f"  bandwidth: {_number(rate)}  # GB/s of {said}", f"  latency: {_number(latency)}  # us"]


def _number(value: float) -> str:
    """As YAML reads it: an exponent wants a point before it."""
    text = f"{value:.4g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1 << 10 else f"{size >> 10} KB" if size < 1 << 20 else f"{size >> 20} MB"


def measured_machine(device: torch.device) -> MeasuredMachine:
    """This machine, and those of all ranks that have been joined. Collective.

    Figures of a device are those of the slowest rank, which all others wait for. Raises :class:`UserError` for
    machines with different numbers of ranks.
    """
    hosts = tell_all(socket.gethostname(), _everybody()) if dist.is_initialized() else [socket.gethostname()]
    node = hosts.count(hosts[0])
    if any(hosts.count(host) != node for host in hosts):
        raise UserError("machines have different numbers of ranks: start equally many on each.")
    timer = Timer(device, _meet)
    described, at, products = _slowest_of(*device_of(_device_name(device), timer, _memory(device, node)))
    times = {}
    if dist.is_initialized():
        times = measured_links(hosts, device)
    links = dict(_ASSUMED)
    if (inside := times.get("inside")) is not None:
        links["inside"] = Link(inside.summing[1], inside.summing[0])
    if (between := times.get("between")) is not None:
        links["between"], at = between_link(between, node, at)
    names = list(dict.fromkeys(hosts))
    where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    source = (
        f"on {where} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by python -m fft.plan.measure, torch "
        f"{torch.__version__}, {len(hosts)} {'ranks at once' if len(hosts) > 1 else 'rank'}"
    )
    name = f"{node}x {described.name}"
    return MeasuredMachine(
        Machine(name, described, node, links["inside"], links["between"], at), source, products, times
    )


def between_link(times: LinkTimes, node: int, at: Constants) -> tuple[Link, Constants]:
    """The link of a node, each rank of which took part in what was measured; and what exchanges reach of it."""
    (_, message), (latency, summing), gathering = times.message, times.summing, times.gathering
    link = Link(message * node, latency)
    return link, replace(at, wire=1.0, network=gathering / message, summing=summing / gathering)


def measured_links(hosts: Sequence[str], device: torch.device) -> dict[str, LinkTimes]:
    """Of ranks on these hosts, by rank: inside a host; between hosts, each rank of one with its like. Collective."""
    names = list(dict.fromkeys(hosts))
    ranks = [[rank for rank, host in enumerate(hosts) if host == name] for name in names]
    times = {}
    if len(ranks[0]) > 1:
        times["inside"] = link_times(own_group(ranks), device)
    if len(ranks) > 1:
        times["between"] = link_times(own_group([list(alike) for alike in zip(*ranks, strict=True)]), device)
    return times


def _slowest_of(
    device: Device, at: Constants, products: list[LinearTime]
) -> tuple[Device, Constants, list[LinearTime]]:
    if not dist.is_initialized():
        return device, at, products
    told = tell_all([asdict(device), asdict(at), [asdict(one) for one in products]], _everybody())
    found, constants, sizes = min(told, key=lambda one: one[0]["peak"] * one[0]["reached"])
    return (
        Device(**(found | {"flash": tuple(found["flash"]), "attention": tuple(map(tuple, found["attention"]))})),
        Constants(**constants),
        [LinearTime(**one) for one in sizes],
    )


def _everybody() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no ranks have been joined")
    return group


def _meet() -> None:
    """Wait for all ranks, if there are others."""
    if dist.is_initialized():
        dist.barrier()


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''} a rank"


def _processor() -> str:
    """Its name, where the system tells it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    names = re.findall(r"^model name\s*:\s*([\w .()@-]+)", told, re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def _memory(device: torch.device, node: int) -> float:
    """Bytes that a rank has."""
    if device.type == "cpu":
        return psutil.virtual_memory().total / node
    return float(torch.get_device_module(device).mem_get_info(device)[1])
