"""LoSiA and SMT: chosen sub-matrices of W0 are trained themselves. Linear in what trains.

Wang et al., "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization",
2025, https://arxiv.org/abs/2507.04487
He et al., "Sparse Matrix in Large Language Model Fine-tuning" (SMT), 2024,
https://arxiv.org/abs/2405.15525

    losia   rows I, columns J, r of each:        W[I, J] = W0[I, J] + M,    M (r, r) trained
    smt     r blocks of block x block in a grid:  W[block] = W0[block] + M_b, M (r, block, block)
    change = E_I M E_J^T,  and  sum_b E_I(b) M_b E_J(b)^T;   M from 0

Differs from the papers: they choose by gradients on the training rows, which stay with the clients
here; rows, columns and blocks are those of the largest sum of squares of W0. They stay the same for
the run, where LoSiA moves them from time to time. W0 stays apart from what is learned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, most, settled
from fedlora.lora.forms.paca import picks


def largest(x: Tensor, r: int) -> Tensor:
    """The places of the r largest numbers, in order; of equal ones the first."""
    return x.sort(descending=True, stable=True).indices[:r].sort().values


@dataclass(frozen=True, slots=True)
class LoSiA:
    @property
    def scaled(self) -> bool:
        return False

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        most(r, min(W.shape), "the smaller side of the layer's W0")
        square = settled(W.square())  # so that last bits choose nothing
        rows, columns = largest(square.sum(1), r), largest(square.sum(0), r)
        return {"rows": rows, "columns": columns, "sizes": torch.tensor(W.shape)}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"M": torch.zeros(r, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        M, (d, k) = theta["M"], frozen["sizes"].tolist()
        return picks(frozen["columns"], k, M), picks(frozen["rows"], d, M).T @ M


@dataclass(frozen=True, slots=True)
class SMT:
    block: int = 8
    """The rows and columns of a block; must divide both sides of every layer."""

    @property
    def scaled(self) -> bool:
        return False

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        (d, k), b = W.shape, self.block
        if b < 1 or d % b or k % b:
            raise ValueError(f"lora.options block = {b}: must divide {d} and {k}, a layer's sizes")
        most(r, d * k // b**2, "the number of blocks in the layer's W0")
        square = settled(W.square()).reshape(d // b, b, k // b, b).sum((1, 3))
        at = largest(square.flatten(), r)
        within = torch.arange(b)
        rows = (at // (k // b) * b)[:, None] + within  # (r, b)
        columns = (at % (k // b) * b)[:, None] + within
        sizes = torch.tensor(W.shape)
        return {"rows": rows.flatten(), "columns": columns.flatten(), "sizes": sizes}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"M": torch.zeros(r, self.block, self.block)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        M, (d, k) = theta["M"], frozen["sizes"].tolist()
        placed = picks(frozen["rows"], d, M).T @ torch.block_diag(*M)
        return picks(frozen["columns"], k, M), placed
