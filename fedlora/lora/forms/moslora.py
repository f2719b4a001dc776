"""MoSLoRA: a trained r x r mixer between LoRA's A and B. Multilinear, in three tensors.

Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation", EMNLP 2024,
https://arxiv.org/abs/2406.11909

    change = (alpha / r) B M A,    A (r, k) drawn, M (r, r) orthogonal, B (d, r) from 0; all train

M trains beside both sides, so a strategy that is exact because one side stands still is not exact
here, and is refused.

Differs from the paper: M begins orthogonal, one of its two choices, whatever the layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, uniform


@dataclass(frozen=True, slots=True)
class MoSLoRA:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return Sides("A", "B")

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        A, square = uniform(r, k, generator), torch.randn(r, r, generator=generator).double()
        Q, R = torch.linalg.qr(square)
        return {"A": A, "B": torch.zeros(d, r), "M": Q * R.diagonal().sign()}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        return theta["A"], theta["B"] @ theta["M"]
