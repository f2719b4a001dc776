"""LoSiA and SMT: chosen sub-matrices of W0 are trained themselves. Linear in what trains.

Wang et al., "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization",
2025, https://arxiv.org/abs/2507.04487
He et al., "Sparse Matrix in Large Language Model Fine-tuning" (SMT), 2024,
https://arxiv.org/abs/2405.15525

    losia   rows I, columns J, r of each:        W[I, J] = W0[I, J] + M,    M (r, r) trained
    smt     r blocks of block x block in a grid:  W[block] = W0[block] + M_b, M (r, block, block)
    change = E_I M E_J^T,  and  sum_b E_I(b) M_b E_J(b)^T;   M from 0

Which, by `choice`, with G (d, k) the mean of the clients' first gradients at W0:

    "weight"     losia: rows and columns each of the largest sum of W0^2
                 smt:   blocks of the largest sum of W0^2
    "gradient"   losia: of the largest sum of |x - x^2 / 2|, x = W0 G, number by number: rows first
                 and then columns within them, or columns first, whichever holds more
                 smt:   blocks of the largest mean |G|

"weight" asks nothing of the clients; "gradient" is the papers', and sends G once.

Source: "gradient" from the authors' public code.
Differs from the papers: G is of one pass over 256 of each client's rows, where they smooth it over
steps of full training; as many blocks in each module (SMT's can share them out over modules); the
choice stays for the run, where LoSiA moves it from time to time. W0 stays apart from what is
learned.
Reasons and costs: docs/extend/forms.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, most, settled, within
from fedlora.lora.forms.paca import picks

Choice = Literal["weight", "gradient"]


def largest(x: Tensor, r: int) -> Tensor:
    """The places of the r largest numbers, in order; of equal ones the first."""
    return x.sort(descending=True, stable=True).indices[:r].sort().values


@dataclass(frozen=True, slots=True)
class LoSiA:
    choice: Choice = "weight"
    """Where W0 is largest, or by the clients' first gradients."""

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

    def places(self, W: Tensor, G: Tensor, r: int) -> Tensor:
        """The r rows, and behind them the r columns."""
        x = W * G
        importance = (x - x.square() / 2).abs()
        best, held = torch.arange(0), -1.0
        for first in (0, 1):  # rows, columns
            score = importance if first == 0 else importance.T
            rows = largest(score.sum(1), r)
            columns = largest(score[rows].sum(0), r)
            if (found := float(score[rows][:, columns].sum())) > held:
                best, held = torch.cat([rows, columns] if first == 0 else [columns, rows]), found
        return best

    def at(self, places: Tensor, size: Sequence[int], r: int) -> dict[str, Tensor]:
        d, k = size
        rows = within(places[:r], r, d, "rows")
        columns = within(places[r:], r, k, "columns")
        return {"rows": rows, "columns": columns, "sizes": torch.tensor([d, k])}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"M": torch.zeros(r, r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        M, (d, k) = theta["M"], frozen["sizes"].tolist()
        return picks(frozen["columns"], k, M), picks(frozen["rows"], d, M).T @ M


@dataclass(frozen=True, slots=True)
class SMT:
    block: int = 8
    """The rows and columns of a block; must divide both sides of every layer."""
    choice: Choice = "weight"
    """Where W0 is largest, or by the clients' first gradients."""

    @property
    def scaled(self) -> bool:
        return False

    @property
    def sides(self) -> Sides | None:
        return None

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.at(self._largest(settled(W.square()), r), W.shape, r)

    def places(self, W: Tensor, G: Tensor, r: int) -> Tensor:
        """The r blocks, numbered row by row of the grid."""
        return self._largest(G.abs(), r)

    def at(self, places: Tensor, size: Sequence[int], r: int) -> dict[str, Tensor]:
        (d, k), b = size, self._fitting(size, r)
        at = within(places, r, d * k // b**2, "blocks")
        inside = torch.arange(b)
        rows = (at // (k // b) * b)[:, None] + inside  # (r, b)
        columns = (at % (k // b) * b)[:, None] + inside
        sizes = torch.tensor([d, k])
        return {"rows": rows.flatten(), "columns": columns.flatten(), "sizes": sizes}

    def _fitting(self, size: Sequence[int], r: int) -> int:
        (d, k), b = size, self.block
        if b < 1 or d % b or k % b:
            raise ValueError(f"lora.options block = {b}: must divide {d} and {k}, a layer's sizes")
        most(r, d * k // b**2, "the number of blocks in the layer's W0")
        return b

    def _largest(self, score: Tensor, r: int) -> Tensor:
        """The blocks of the largest sum of a score (d, k)."""
        (d, k), b = score.shape, self._fitting(score.shape, r)
        return largest(score.reshape(d // b, b, k // b, b).sum((1, 3)).flatten(), r)

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"M": torch.zeros(r, self.block, self.block)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        M, (d, k) = theta["M"], frozen["sizes"].tolist()
        placed = picks(frozen["rows"], d, M).T @ torch.block_diag(*M)
        return picks(frozen["columns"], k, M), placed
