"""An adapter form of this library's own: what is frozen, what trains, and the change they make.

    frozen(W0, r, generator)      made once, of W0 (d, k) and the seed; equal on every machine
    first(d, k, r, generator)     what trains, as it begins: with it the change is 0
    pair(theta, frozen)           A (R, k) and B (d, R): the layer adds  s B A x  to W0 x

So each form here is LoRA of some rank R with ties between its numbers, and is exported as plain
LoRA. Where B A is linear in all that trains, a mean of theta is exact; where it is linear in each
tensor alone, that mean is off by a covariance. `sides` names the tensors that stand for A and B
in strategies that treat each side by itself, under which B A is linear in either.

What is frozen is not sent. Each machine makes it in float64, `settled` to 12 bits so that machines
whose last bits differ agree, and all of its bytes are in the fingerprint of the model, which a
client and its server compare before anything trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sides:
    """The tensor on A's side and the one on B's, with the sizes that strategies see.

    A (rank, k) and B (d, rank), though d and k may be smaller than the layer's own.
    """

    A: str
    B: str


class OwnForm(Protocol):
    """One adapter form; a frozen dataclass whose fields are the keys of lora.options."""

    @property
    def scaled(self) -> bool:
        """Is s = lora.alpha / r? Else 1."""

    @property
    def sides(self) -> Sides | None: ...

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What stays as it is, in float64 or whole numbers, of W0 (d, k) in float64.

        Raises:
            ValueError: r or an option does not fit these sizes; says which must be what.
        """

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What trains, as it begins. A tensor called shared_* is one of all layers of its size."""

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        """A (R, k) and B (d, R) of the change B A, in theta's dtype."""


@runtime_checkable
class ByGradient(Protocol):
    """A form that can train where the loss's gradient says so, in place of where W0 does."""

    def places(self, W: Tensor, G: Tensor, r: int) -> Tensor:
        """Whole numbers that say where, of W0 and the gradient there, both (d, k)."""

    def at(self, places: Tensor, size: Sequence[int], r: int) -> dict[str, Tensor]:
        """What is frozen, of `places`, in a layer of size (d, k).

        Raises:
            ValueError: they are none of such a layer at rank r.
        """


def numbers(texts: Sequence[str]) -> Tensor:
    """Whole numbers of 0 to 2^31 that were sent as text; ValueError where one is none."""
    if bad := [x for x in texts if not (x.isascii() and x.isdigit() and len(x) < 10)]:
        raise ValueError(f"lora.places has {bad[0][:20]!r}: must be a whole number")
    return torch.tensor([int(x) for x in texts], dtype=torch.int64)


def within(places: Tensor, n: int, size: int, what: str) -> Tensor:
    """Themselves: n different places of `size`, in ascending order; else ValueError."""
    mine = places.tolist()
    if len(mine) != n or mine != sorted({*mine}) or not 0 <= mine[0] <= mine[-1] < size:
        raise ValueError(
            f"lora.places has {len(mine)} {what}, {mine[:4]}...: must be {n} of 0 to {size - 1}, "
            "each once and in ascending order"
        )
    return places


def settled(x: Tensor) -> Tensor:
    """To 12 bits of the largest entry: what two machines' last bits decide is rounded away."""
    top = float(x.abs().max())
    if not top:
        return x
    step = 2.0 ** (torch.frexp(torch.tensor(top, dtype=torch.float64))[1].item() - 12)
    rounded: Tensor = (x / step).round() * step
    return rounded


def signed(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """U (d, r) and V^T (r, k) of an SVD with the largest entry of each right vector positive."""
    at = Vh.abs().argmax(1, keepdim=True)
    sign = Vh.gather(1, at).sign()  # (r, 1)
    return U * sign.T, Vh * sign


def leading(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r (d, r), S_r (r) and V_r^T (r, k) of the SVD of W, signs fixed; in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    U, Vh = signed(U[:, :r], Vh[:r])
    return U, S[:r], Vh


def most(r: int, bound: int, what: str) -> None:
    """Raises ValueError where r is above its bound."""
    if r > bound:
        raise ValueError(f"clients.ranks = {r}: must be at most {bound}, {what}")


def uniform(rows: int, k: int, generator: torch.Generator) -> Tensor:
    """(rows, k), uniform in +-1/sqrt(k), as PEFT draws LoRA's A."""
    x: Tensor = (2 * torch.rand(rows, k, generator=generator) - 1) / k**0.5
    return x
