"""LoLDU: the diagonal of W0 = P L D U is trained, L and U are kept. Linear in what trains.

Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for
Parameter-Efficient Fine-Tuning", 2024, https://arxiv.org/abs/2410.13618

    W0 = P L D U      LU with row pivoting; L and U have ones on their diagonals
    change = P L_r D_r diag(z) U_r,    z (r) trained, from 0: D_i becomes D_i (1 + z_i)

Differs from the paper: the paper draws D anew and takes what it changes out of W0, which here stays
whole; z is relative to D_i; the scale beside D, one number a layer, is not trained, so that the
form stays linear. The leading r of min(d, k) numbers train. The frozen factors have 12 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, most, settled


@dataclass(frozen=True, slots=True)
class LoLDU:
    @property
    def scaled(self) -> bool:
        return False

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        most(r, min(W.shape), "the smaller side of the layer's W0")
        P, L, DU = torch.linalg.lu(W)
        return {"PL": settled((P @ L)[:, :r]), "DU": settled(DU[:r])}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"z": torch.zeros(r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        z = theta["z"]
        return frozen["DU"].to(z), frozen["PL"].to(z) * z
