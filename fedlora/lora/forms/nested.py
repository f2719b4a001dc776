"""LoRA-Mini and NoRA: a small trained LoRA between two frozen outer factors. Multilinear.

Singh et al., "LoRA-Mini: Adaptation Matrices Decomposition and Selective Training", 2024,
https://arxiv.org/abs/2411.15804
Lin et al., "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models", 2024,
https://arxiv.org/abs/2408.10280

    change = (alpha / r) B_out B A A_out     A (r, a) drawn, B (a, r) from 0: 2 a r numbers train
    lora-mini   A_out (a, k), B_out (d, a) drawn, with entries of deviation 1/sqrt(a)
    nora        A_out = S^1/2 V_a^T, B_out = U_a S^1/2 of the SVD of W0, over |W0|'s largest S

It is LoRA of rank r in a space of a dimensions, and strategies see it so.

Differs from the papers: r of both is clients.ranks, a the option `width`; NoRA's outer pair is not
taken out of W0 since B begins at 0. The frozen factors have 12 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, leading, most, settled, uniform


def inner(a: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A (r, a) drawn and B (a, r) zero."""
    return {"A": uniform(r, a, generator), "B": torch.zeros(a, r)}


def within(theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
    """A A_out (r, k) and B_out B (d, r)."""
    A, B = theta["A"], theta["B"]
    return A @ frozen["A_out"].to(A), frozen["B_out"].to(B) @ B


@dataclass(frozen=True, slots=True)
class LoraMini:
    width: int = 32
    """a: the dimensions between the outer factors."""

    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return Sides("A", "B")

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        (d, k), a = W.shape, self.width
        most(r, a, "lora.options width")
        A = torch.randn(a, k, generator=generator) / a**0.5
        B = torch.randn(d, a, generator=generator) / a**0.5
        return {"A_out": settled(A.double()), "B_out": settled(B.double())}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return inner(self.width, r, generator)

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        return within(theta, frozen)


@dataclass(frozen=True, slots=True)
class NoRA:
    width: int = 32
    """a: how many of W0's singular vectors stand outside."""

    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return Sides("A", "B")

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.width > min(W.shape):
            raise ValueError(
                f"lora.options width = {self.width}: must be at most {min(W.shape)}, the smaller "
                "side of the layer's W0"
            )
        most(r, self.width, "lora.options width")
        U, S, Vh = leading(W, self.width)
        root = (S / S[0]).sqrt()
        return {"A_out": settled(root[:, None] * Vh), "B_out": settled(U * root)}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return inner(self.width, r, generator)

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        return within(theta, frozen)
