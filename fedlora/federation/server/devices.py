"""Simulates devices slower than this machine, on a virtual clock that no one waits for.

    devices.classes = "fast:1:100,mid:0.5:20,slow:0.2:5:3"

Each class is name:compute:Mbit/s, and optionally the most layers its memory can train; client i
is of class i modulo their number. A client's round then takes

    down      8 * bytes down / (Mbit/s * 1e6)
    forward   tokens * 2 * P / speed                P weights outside the embeddings
    backward  tokens * 2 * P_l / speed              for each layer l from its first adapted one on
    up        8 * bytes up / (Mbit/s * 1e6)

with speed = compute * devices.gflops * 1e9. Frozen weights need a gradient of what came in and
none of themselves, hence 2 P_l and not 4; layers below the first adapted one need none. Both
speeds vary around that by a log-normal trace: x_t = rho x_{t-1} + sqrt(1 - rho^2) jitter e_t,
which is a function of (seed, client) alone. Nothing here is measured, so it is the same on every
machine and engine. Local evaluation and the server's own work take no virtual time.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fedlora.errors import ConfigError
from fedlora.federation.server.ranks import Timing, waiting
from fedlora.strategies.base import seeded

RHO = 0.7
"""How much of a round's deviation from the class's speed the next round keeps."""


@dataclass(frozen=True, slots=True)
class Device:
    """A class of devices."""

    name: str
    compute: float
    mbit: float
    layers: int = 0
    """The most layers it can train; 0: all."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a client did in a round."""

    tokens: int
    depth: int
    """Layers that its gradient passed through."""
    bytes_down: int
    bytes_up: int
    numbers_up: int


@dataclass(frozen=True, slots=True)
class Spent:
    """Virtual seconds of one client's round, by what they were spent on."""

    down: float
    forward: float
    backward: float
    up: float

    @property
    def total(self) -> float:
        return self.down + self.forward + self.backward + self.up

    def timing(self, work: Work) -> Timing:
        """The seconds in LEGEND's units: forward, a layer backward, a number sent."""
        layers, numbers = max(work.depth, 1), max(work.numbers_up, 1)
        return Timing(self.forward, self.backward / layers, self.up / numbers)


@dataclass(frozen=True, slots=True)
class Devices:
    """The federation's device model."""

    classes: Sequence[Device]
    gflops: float
    jitter: float
    seed: int
    forward: float
    """Operations a token of the whole forward pass."""
    backward: float
    """Operations a token of one layer's backward pass."""

    def of(self, client: int) -> Device:
        return self.classes[client % len(self.classes)]

    def pace(self, client: int, round: int) -> tuple[float, float]:
        """The factors on a client's compute and network speed in a round."""
        chance = seeded(self.seed, 0, client, "device")
        x = torch.randn(2, generator=chance, dtype=torch.float64)
        for _ in range(round - 1):
            e = torch.randn(2, generator=chance, dtype=torch.float64)
            x = RHO * x + math.sqrt(1 - RHO**2) * e
        compute, network = (self.jitter * x).exp().tolist()
        return compute, network

    def spent(self, client: int, round: int, work: Work) -> Spent:
        device, (compute, network) = self.of(client), self.pace(client, round)
        speed = device.compute * self.gflops * 1e9 * compute
        wire = device.mbit * 1e6 / 8 * network
        return Spent(
            work.bytes_down / wire,
            work.tokens * self.forward / speed,
            work.tokens * self.backward * work.depth / speed,
            work.bytes_up / wire,
        )

    def record(
        self,
        spent: Mapping[int, Spent],
        works: Mapping[int, Work],
        clock: float,
        deadline: float,
        landed: float | None = None,
    ) -> dict[str, Any]:
        """The "virtual" part of a round's record; `clock` is when the round began.

        landed: when its last update came, of rounds in which nobody waits for another.
        """
        totals = [s.total for s in spent.values()]
        late = [i for i, s in spent.items() if deadline and s.total > deadline]
        took = max(totals, default=0.0)
        took = min(took, deadline) if deadline else took
        if landed is not None:
            took = max(0.0, landed - clock)
        return {
            "seconds": took,
            "clock": clock + took,
            "waiting": 0.0 if landed is not None else waiting([min(t, took) for t in totals]),
            "late": sorted(late),
            "clients": {
                i: {
                    "class": self.of(i).name,
                    "depth": works[i].depth,
                    **asdict(s),
                    "total": s.total,
                }
                for i, s in sorted(spent.items())
            },
        }


def parse_classes(parts: Sequence[str]) -> tuple[Device, ...]:
    """ "fast:1:100,slow:0.2:5:3", split at the commas, as device classes.

    Raises:
        ConfigError: a part is not name:compute:Mbit/s[:layers] of positive numbers.
    """
    found, wrong = [], []
    for part in parts:
        name, *numbers = part.split(":")
        try:
            compute, mbit = map(float, numbers[:2])
            layers = int(numbers[2]) if len(numbers) > 2 else 0
            if not name or min(compute, mbit) <= 0 or layers < 0 or len(numbers) > 3:
                raise ValueError
            found.append(Device(name, compute, mbit, layers))
        except ValueError:
            wrong.append(
                f'devices.classes: "{part}" must be name:compute:Mbit/s, as in "slow:0.2:5", with '
                'the most layers it can train after it if it cannot train all ("slow:0.2:5:3")'
            )
    if wrong:
        raise ConfigError(wrong)
    return tuple(found)


ADDED = re.compile(r"\blora_|\bmodules_to_save\b")
"""Parameters that PEFT added: which, depends on what was loaded before."""


def operations(base: nn.Module, depth_of: Any) -> tuple[float, float]:
    """Operations a token of the forward pass, and of one layer's backward pass."""
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    seen = {
        n: p.numel()
        for n, p in base.named_parameters()
        if id(p) not in tables and p.ndim > 1 and not ADDED.search(n)
    }
    inside: dict[int, int] = {}
    for name, numel in seen.items():
        if (depth := depth_of(name)) is not None:
            inside[depth] = inside.get(depth, 0) + numel
    total = sum(seen.values())
    return 2.0 * total, 2.0 * (sum(inside.values()) / len(inside) if inside else total)
