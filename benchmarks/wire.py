"""A wire between two network devices, in user space, for kernels without netem: frames take their time, some are lost.

``wire.py A B DELAY LOSS`` carries frames between two devices, each for DELAY seconds, but for a share LOSS of them.
``wire.py plain DEVICE`` has the system make whole frames for a device, checksums and all, as a wire needs them.
"""

import contextlib
import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

#: The call that switches what a device does by itself, and what: checksums of frames, several frames in one.
_SIOCETHTOOL, _HELP = 0x8946, (0x17, 0x1F, 0x24, 0x2C)
_EVERY_PROTOCOL, _OUTGOING, _LARGEST = 3, 4, 1 << 16


def make_plain(device: str) -> None:
    """Have whole frames of the device's size go out, with their checksums."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for number in _HELP:
            value = ctypes.create_string_buffer(struct.pack("II", number, 0), 8)
            with contextlib.suppress(OSError):  # what a device cannot do needs no switching off
                fcntl.ioctl(any_socket, _SIOCETHTOOL, struct.pack("16sP", device.encode(), ctypes.addressof(value)))


def carry(devices: list[str], delay: float, loss: float) -> None:
    """Carry frames both ways, until the process is ended."""
    ends = [_end(device) for device in devices]
    under_way: list[tuple[float, int, int, bytes]] = []
    count, chance = 0, random.Random(0)
    print("ready", flush=True)
    while True:
        patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
        for end in select.select(ends, [], [], patience)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, address = end.recvfrom(_LARGEST)
                    if address[2] == _OUTGOING:
                        continue
                    count += 1
                    if chance.random() >= loss:
                        heapq.heappush(under_way, (time.monotonic() + delay, count, 1 - ends.index(end), frame))
        while under_way and under_way[0][0] <= time.monotonic():
            *_, other, frame = heapq.heappop(under_way)
            with contextlib.suppress(BlockingIOError):  # a queue that is full loses frames, as on any wire
                ends[other].send(frame)


def _end(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
    end.bind((device, 0))
    end.setblocking(False)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    return end


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        make_plain(sys.argv[2])
        print("ready", flush=True)
    else:
        carry(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
