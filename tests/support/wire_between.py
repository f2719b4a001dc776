"""A bad network between two network namespaces: what `tc netem` does, where the kernel lacks it.

    python wire_between.py NAMESPACE DEVICE NAMESPACE DEVICE --delay 0.03 --loss 0.02 --rate 250000

Makes a TUN device in each and carries every packet from one to the other: `delay` seconds later,
no faster than `rate` bytes a second each way, and with a chance of `loss` not at all. Says "ready";
at SIGTERM, a JSON line of how many packets it carried and lost.
"""

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUE = 0.5
"""Seconds of traffic that a sender's queue holds; what comes on top is lost."""


def tun(namespace: str, device: str) -> int:
    """A new TUN device in that namespace. This thread stays there."""
    with open(f"/var/run/netns/{namespace}") as f:
        if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("namespace", "device", "namespace2", "device2"):
        parser.add_argument(name)
    for name in ("delay", "loss", "rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    given = parser.parse_args()
    ends = (tun(given.namespace, given.device), tun(given.namespace2, given.device2))
    other, free_at = dict(zip(ends, ends[::-1], strict=True)), dict.fromkeys(ends, 0.0)
    chance, under_way, counts = random.Random(0), [], {"carried": 0, "lost": 0}
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    print("ready", flush=True)
    while not stopped:
        wait = under_way[0][0] - time.monotonic() if under_way else 0.2
        for end in select.select(ends, [], [], min(0.2, max(0.0, wait)))[0]:
            packet, now = os.read(end, 65536), time.monotonic()
            begins = max(now, free_at[end])
            if chance.random() < given.loss or begins - now > QUEUE:
                counts["lost"] += 1
                continue
            free_at[end] = begins + len(packet) / given.rate
            counts["carried"] += 1
            due = free_at[end] + given.delay
            heapq.heappush(under_way, (due, counts["carried"], other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            try:
                os.write(end, packet)
            except OSError:  # the device is not up yet
                counts["lost"] += 1
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
