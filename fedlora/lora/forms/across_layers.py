"""LoTR and MSPLoRA: tensors that all layers of one size share, beside each one's own. Multilinear.

Bershatsky et al., "LoTR: Low Tensor Rank Weight Adaptation", 2024,
https://arxiv.org/abs/2402.01376
Zhao et al., "MSPLoRA: A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning",
2025, https://arxiv.org/abs/2503.21838

    lotr      change_l = (alpha / r) B G_l A,          A (r, k), B (d, r) shared, G_l (r, r) its own
    msplora   change_l = (alpha / r) (B A + B_l A_l),  A (r, k), B (d, r) shared; A_l of rank r // 2

What is shared trains once and travels once. G_l, B and B_l begin at 0.

Differs from the papers: LoTR's shared factors are shared by layers of one size, whatever part of
the model they are of; MSPLoRA's middle scale, of groups of layers, is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, uniform


@dataclass(frozen=True, slots=True)
class LoTR:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        shared = {"shared_A": uniform(r, k, generator), "shared_B": uniform(r, d, generator).T}
        return {**shared, "G": torch.zeros(r, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        return theta["shared_A"], theta["shared_B"] @ theta["G"]


@dataclass(frozen=True, slots=True)
class MSPLoRA:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        if r < 2:
            raise ValueError(f"clients.ranks = {r}: must be at least 2, of which a layer has half")
        return {}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        shared = {"shared_A": uniform(r, k, generator), "shared_B": torch.zeros(d, r)}
        return {**shared, "A": uniform(r // 2, k, generator), "B": torch.zeros(d, r // 2)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        A = torch.cat([theta["shared_A"], theta["A"]])
        return A, torch.cat([theta["shared_B"], theta["B"]], dim=1)
