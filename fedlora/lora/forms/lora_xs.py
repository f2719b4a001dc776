"""LoRA-XS: an r x r matrix between the leading singular vectors of W0. Linear in what trains.

Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024,
https://arxiv.org/abs/2405.17604

    U S V^T = SVD(W0);   A = V_r^T (r, k),  B = U_r S_r (d, r), both frozen;   R (r, r) trained
    change = (alpha / r) B R A

Differs from the paper: R begins at 0 and not at normal numbers of deviation 1e-5, so training
starts from W0 itself; its gradient B^T G A^T is not 0 there. The frozen factors have 12 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, leading, most, settled


@dataclass(frozen=True, slots=True)
class LoraXS:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        most(r, min(W.shape), "the rank of the layer's W0")
        U, S, Vh = leading(W, r)
        return {"A": settled(Vh), "B": settled(U * S)}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"R": torch.zeros(r, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        R = theta["R"]
        return frozen["A"].to(R), frozen["B"].to(R) @ R
