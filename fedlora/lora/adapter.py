"""LoRA adapters as plain tensors.

For a linear module of k inputs and d outputs, adapted at rank r, x -> W0 x + scale * B (A x):

    A      (r, k)
    B      (d, r)
    delta  (d, k)  =  scale * B @ A        scale is alpha / r, or alpha / sqrt(r) for rsLoRA

`Pair` is what the algebra works on: both factors and their scale. `Stack` is a sum of such terms
that nobody has needed as one yet. `Factors` is what trains and travels: any of A, B, the r x r
core R of W0 + scale * B R A, and every other trained tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from fedlora.errors import UpdateError

Tensors = Mapping[str, Tensor]
"""Module path or parameter name to tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The two factors of one module's update, and the scale they were trained at.

    The scale travels with the factors: clients of different rank have different alpha / r,
    and factors averaged without it are silently wrong.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        A, B = self.A.shape, self.B.shape
        if len(A) != 2 or len(B) != 2 or B[1] != A[0]:
            raise UpdateError(
                f"B {tuple(B)} and A {tuple(A)} do not multiply: "
                "B's columns and A's rows must both be the rank"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), of the delta."""
        return self.B.shape[0], self.A.shape[1]

    def numel(self) -> int:
        """Numbers in both factors."""
        return self.A.numel() + self.B.numel()

    def delta(self) -> Tensor:
        """The dense update, (d, k). For folding into a base, export and tests."""
        return self.scale * (self.B @ self.A)

    def __call__(self, x: Tensor) -> Tensor:
        """The update applied to columns x (k, n), as (d, n), without forming delta."""
        columns: Tensor = self.scale * (self.B @ (self.A @ x))
        return columns


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The exact sum of terms s_i (B_i - B_c) (A_i - A_c); without a centre, of s_i B_i A_i.

    The terms stay the tensors they are, so a stack costs nothing until somebody needs them
    together: a matrix product, or the message that carries them.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scale: tuple[float, ...]
    centre: Pair | None = None

    @property
    def rank(self) -> int:
        return sum(A.shape[0] for A in self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), of the delta."""
        return self.B[0].shape[0], self.A[0].shape[1]

    def numel(self) -> int:
        """Numbers in all factors."""
        return self.rank * sum(self.shape)

    def terms(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each term's A and B, less the centre."""
        if (c := self.centre) is None:
            return self.A, self.B
        return tuple(A - c.A for A in self.A), tuple(B - c.B for B in self.B)

    def pair(self) -> Pair:
        """One pair of rank R = sum of the ranks, in float32 at least, at scale 1.

        The scales go into A (R, k), whose blocks are contiguous rows; B is (d, R).
        """
        As, Bs = self.terms()
        dtype = reduce(torch.promote_types, (x.dtype for x in (*As, *Bs)), torch.float32)
        whole = As[0].new_empty(self.rank, As[0].shape[1], dtype=dtype)
        blocks = whole.split([A.shape[0] for A in As])
        for A, scale, rows in zip(As, self.scale, blocks, strict=True):
            torch.mul(A.to(dtype), scale, out=rows)
        return Pair(whole, torch.cat(Bs, dim=1).to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """The update applied to columns x (k, n), as (d, n)."""
        terms = zip(*self.terms(), self.scale, strict=True)
        return torch.stack([s * (B @ (A @ x)) for A, B, s in terms]).sum(0)


Adapter = Mapping[str, Pair]
"""Module path, such as "bert.encoder.layer.0.attention.self.query", to its pair."""

Delta = Pair | Stack | Tensor
"""A change of one base weight: in factors, or dense (d, k) where that is smaller."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What a client trains or what travels, by module path. What is not there was not sent."""

    scale: Mapping[str, float] = field(default_factory=dict)
    A: Tensors = field(default_factory=dict)
    B: Tensors = field(default_factory=dict)
    R: Tensors = field(default_factory=dict)
    other: Tensors = field(default_factory=dict)
    """Every other trained tensor by parameter name: the head, biases, DoRA magnitudes, ..."""

    def adapter(self) -> Adapter:
        """The pairs whose A and B are both here; a core R is absorbed into B as B R."""
        return {
            m: Pair(self.A[m], self.B[m] @ self.R[m] if m in self.R else self.B[m], self.scale[m])
            for m in self.A
            if m in self.B
        }

    def items(self) -> Iterator[tuple[str, str, Tensor]]:
        """(column, name, tensor) of all that is here; columns in a fixed order."""
        for column in COLUMNS:
            for name, tensor in getattr(self, column).items():
                yield column, name, tensor


COLUMNS = ("A", "B", "R", "other")


def apply(delta: Delta, x: Tensor) -> Tensor:
    """A base change applied to columns x (k, n): (d, n)."""
    return delta @ x if isinstance(delta, Tensor) else delta(x)


def dense(delta: Delta) -> Tensor:
    delta = together(delta)
    return delta.delta() if isinstance(delta, Pair) else delta


def together(delta: Delta) -> Pair | Tensor:
    """A stack as the one pair it is; anything else as it is."""
    return delta.pair() if isinstance(delta, Stack) else delta


def clone(factors: Factors) -> Factors:
    """A copy that shares no storage: what leaves a client must not change when it trains on."""

    def copied(tensors: Tensors) -> Tensors:
        return {name: t.detach().clone() for name, t in tensors.items()}

    return Factors(
        dict(factors.scale),
        copied(factors.A),
        copied(factors.B),
        copied(factors.R),
        copied(factors.other),
    )


def kaiming(rank: int, k: int, generator: torch.Generator) -> Tensor:
    """A fresh A (rank, k) as PEFT draws it: uniform in +-1/sqrt(k)."""
    A: Tensor = (2 * torch.rand(rank, k, generator=generator) - 1) / k**0.5
    return A
