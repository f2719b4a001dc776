"""PMSS: a small matrix between skeleton columns and rows of W0. Linear in what trains.

Wang et al., "PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning", COLING 2025,
https://arxiv.org/abs/2409.16722

    C = W0[:, J] (d, r),  R = W0[I] (r, k), frozen;   M (r, r) trained, from 0
    change = (alpha / r) C M R

I and J are chosen greedily: the row, or column, that is farthest from the span of those chosen
(QR with pivoting). r may be far above LoRA's, since r^2 numbers train.

Differs from the paper: W0's skeletons are divided by |W0| / sqrt(min(d, k)), its root mean square
singular value, so that one rate fits layers of different size; they have 12 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, most, settled


def skeleton(W: Tensor, r: int) -> Tensor:
    """The indices of r rows of W (d, k), each the farthest from the span of those before it."""
    left, chosen = W.double().clone(), []
    for _ in range(r):
        i = int(left.norm(dim=1).argmax())
        chosen.append(i)
        q = left[i] / left[i].norm().clamp(min=1e-300)
        left = left - torch.outer(left @ q, q)
        left[chosen] = 0
    return torch.tensor(sorted(chosen))


@dataclass(frozen=True, slots=True)
class Pmss:
    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        most(r, min(W.shape), "the smaller side of the layer's W0")
        size = W.norm() / min(W.shape) ** 0.5
        rows, columns = skeleton(W, r), skeleton(W.T, r)
        return {"A": settled(W[rows] / size), "B": settled(W[:, columns] / size)}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"M": torch.zeros(r, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        M = theta["M"]
        return frozen["A"].to(M), frozen["B"].to(M) @ M
