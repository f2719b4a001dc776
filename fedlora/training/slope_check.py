"""Does the loss follow a tensor as its gradient says? A central difference, in sight of rounding.

    loss(w + t d) - loss(w - t d) = 2 t g.d

d has the gradient's signs and is seeded in size, and t makes the change CHANGE times what rounding
does to the loss, or is LARGEST. `training_check` has what it is for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.errors import TrainingCheckError
from fedlora.strategies.base import seeded
from fedlora.training.devices import wide_on_host

CHANGE = 20.0
LARGEST = 0.5
"""The largest t, where d is as large as the tensor."""
LOOKS = 16
"""How many differences of a tensor are taken, where one at the largest t is out of its bounds."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a precision does to a healthy model."""

    rounding: float
    """Of a loss, relative: the least that is reckoned with."""
    jitter: float
    """A relative change of the weights that says how far rounding moves the loss."""
    low: float
    high: float
    """Of the measured change over 2 t g.d."""
    private: float
    """Of the private step's gradient, its distance from the plain one, relative."""


def check_slope(
    name: str,
    gradient: Mapping[nn.Parameter, Tensor],
    loss: Callable[[], float],
    rounding: float,
    tolerance: Tolerance,
    seed: int,
) -> None:
    """A central difference along a direction in which the gradient says that much changes.

    Of a tensor so small that even the largest t changes the loss by less than CHANGE times what
    rounding does, one difference may be noise alone: then the mean of LOOKS others is judged.
    """
    change, want, t = _difference(name, gradient, loss, rounding, seed)
    if t == LARGEST and not _follows(change, want, rounding, tolerance):
        looks = [
            _difference(f"{name} {n}", gradient, loss, rounding, seed)[:2] for n in range(LOOKS)
        ]
        change, want = (sum(xs) / LOOKS for xs in zip(*looks, strict=True))
    if not _follows(change, want, rounding, tolerance):
        raise TrainingCheckError(
            f"the loss does not follow {name} as its gradient says: weights that are stale, "
            "detached, or not in the forward pass",
            f"it changes by {change:.2e}, the gradient says {want:.2e}",
        )


def _follows(change: float, want: float, rounding: float, tolerance: Tolerance) -> bool:
    return tolerance.low * want - 2 * rounding <= change <= tolerance.high * want + 2 * rounding


def _difference(
    name: str,
    gradient: Mapping[nn.Parameter, Tensor],
    loss: Callable[[], float],
    rounding: float,
    seed: int,
) -> tuple[float, float, float]:
    """loss(w + t d) - loss(w - t d), what the gradient makes of it, and t."""
    direction = {p: g.sign() * noise_like(p, name, i, seed).abs() * size_of(p)
                 for i, (p, g) in enumerate(gradient.items())}  # fmt: skip
    slope = sum(float(wide_on_host(gradient[p] * d).sum()) for p, d in direction.items())
    t = min(CHANGE * rounding / (2 * slope), LARGEST)
    losses = []
    for sign in (t, -t):
        with moved(direction, sign):
            losses.append(loss())
    return losses[0] - losses[1], 2 * t * slope, t


@contextmanager
def moved(direction: Mapping[nn.Parameter, Tensor], t: float) -> Iterator[None]:
    """Within it, the weights are moved by t d; after it they have their old bits."""
    home = {p: p.detach().clone() for p in direction}
    try:
        with torch.no_grad():
            for p, d in direction.items():
                p.add_(d, alpha=t)
        yield
    finally:
        put_back(home)


def put_back(home: Mapping[nn.Parameter, Tensor]) -> None:
    with torch.no_grad():
        for p, w in home.items():
            p.copy_(w)


def noise_like(p: Tensor, name: str, i: int, seed: int) -> Tensor:
    generator = seeded(seed, 0, i, f"training check/{name}")
    return torch.randn(p.shape, generator=generator).to(p)


def size_of(p: Tensor) -> float:
    """The root mean square of a tensor's numbers; 1 where all are zero."""
    return float(wide_on_host(p).square().mean().sqrt()) or 1.0
