"""PaCA: some columns of W0 are trained themselves. Linear in what trains.

Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025,
https://openreview.net/forum?id=iYkhxre0In

    J    r of the k columns, drawn from the seed
    W[:, J] = W0[:, J] + s D,   D (d, r) trained, from 0, s = lora.alpha / r
    change = s D E_J^T x = s D x_J

Differs from the paper: W0 stays apart from what is learned, so the paper's saving of memory, which
comes of training the weight in place, is not had; the numbers are the same. s scales the step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, most


def picks(index: Tensor, n: int, like: Tensor) -> Tensor:
    """E^T (len(index), n): the rows of the identity at these places."""
    found = like.new_zeros(len(index), n)
    found[torch.arange(len(index), device=like.device), index.to(like.device)] = 1
    return found


@dataclass(frozen=True, slots=True)
class Paca:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        k = W.shape[1]
        most(r, k, "the layer's number of columns")
        chosen = torch.randperm(k, generator=generator)[:r].sort().values
        return {"columns": chosen, "k": torch.tensor([k])}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"D": torch.zeros(d, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        D = theta["D"]
        return picks(frozen["columns"], int(frozen["k"]), D), D
