"""What every row is made of: paired ratios, peak memory of a fork, and the row itself."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One figure of the table."""

    name: str
    value: float | None
    """None where it could not be measured; `how` says why."""
    target: str
    """Such as "<= 3" or ">= 20"; empty for a figure that is recorded, not required."""
    how: str

    @property
    def met(self) -> bool | None:
        if not self.target or self.value is None:
            return None
        sign, _, bound = self.target.partition(" ")
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "target": self.target, "met": self.met,
                "how": self.how}  # fmt: skip


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], times: int, clock: Clock = time.process_time
) -> tuple[float, float, float]:
    """Median of ours / theirs, and the median time of each; one after the other, `times` times.

    CPU time by default: other jobs on the machine then disturb both sides alike, and little.
    """
    a, b = [], []
    for _ in range(times):
        a.append(spent(ours, clock))
        b.append(spent(theirs, clock))
    ratios = [x / max(y, 1e-9) for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), statistics.median(a), statistics.median(b)


def spent(work: Callable[[], Any], clock: Clock = time.process_time) -> float:
    begun = clock()
    work()
    return clock() - begun


def forked(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `work` gives in a forked process, and that process's peak resident MB."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        found = work(*args)
        there.send((found, peak()))

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        result: tuple[Any, float] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__}: its process ended with {process.exitcode}") from None
    process.join()
    return result


def peak() -> float:
    """Peak resident MB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}
