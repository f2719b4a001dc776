"""The changes of a moving base, in order: what a client that was away lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fedlora.lora.adapter import Delta, dense
from fedlora.lora.lowrank import accumulate
from fedlora.strategies.base import Version


@dataclass(frozen=True, slots=True, eq=False)
class BaseLog:
    """The changes of a moving base, in factors, so that a client that was away gets what it lacks.

    A change is kept dense where that is smaller, and where the changes together outgrow a dense
    matrix, all but the newest fold into one snapshot: a client that missed nothing is never sent
    more than the newest. Clients add the changes in order whichever way they come, so one that
    was away ends with the same bits as one that never was.
    """

    versions: tuple[Version, ...] = ()

    @property
    def number(self) -> int:
        return self.versions[-1].number if self.versions else 0

    def add(self, delta: Mapping[str, Delta]) -> "BaseLog":
        small = {m: dense(x) if x.numel() > prod(x.shape) else x for m, x in delta.items()}
        new = Version(self.number + 1, small)
        log = (*self.versions, new)
        return BaseLog((_snapshot(log[:-1]), new) if _outgrown(log) else log)

    def since(self, version: int) -> tuple[Version, ...]:
        return tuple(v for v in self.versions if v.number > version)


def _outgrown(log: Sequence[Version]) -> bool:
    size = sum(x.numel() for v in log if not v.snapshot for x in v.delta.values())
    return size > sum({m: prod(x.shape) for v in log for m, x in v.delta.items()}.values())


def _snapshot(log: Sequence[Version]) -> Version:
    totals: dict[str, Tensor] = {}
    for v in log:
        for m, delta in v.delta.items():
            totals[m] = accumulate(totals.get(m), delta)
    return Version(log[-1].number, totals, snapshot=True)
