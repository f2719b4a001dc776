"""The r x r core between LoRA's factors, which PEFT does not have: Fed-SB's and RAVAN's R."""

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn


class Core(LoraVariant):  # type: ignore[misc]
    """x -> W0 x + s B R (A x): PEFT's extension point, with the r x r core between the factors.

    With `block`, only the diagonal blocks of that size get gradients; if they are `scaled` too,
    R = diag(s_1 H_1, .., s_h H_h), of which the numbers s_j, 1 at first, train beside the H_j.
    """

    def __init__(self, R: Tensor, block: int = 0, scaled: bool = False) -> None:
        self.R = nn.Parameter(R)
        self.block, self.scales = block, None
        self.others: tuple[Tensor, Tensor] | None = None
        """Which rows train (r, 1), and R with those that do not."""
        self.mask = inside(R, block) if block else None
        if self.mask is not None:
            self.R.register_hook(functools.partial(masked, self.mask))
        if scaled and block:
            self.scales = nn.Parameter(R.new_ones(len(R) // block))

    def only(self, ranks: Tensor) -> None:
        """From now on these rows of R alone train, whatever an optimiser does to the others."""
        mine = torch.zeros(len(self.R), 1, dtype=torch.bool, device=self.R.device)
        mine[ranks.to(mine.device)] = True
        self.others = mine, self.whole().detach().clone()

    def whole(self) -> Tensor:
        """R (r, r), with its blocks' numbers in it."""
        R: Tensor = self.R
        if self.scales is not None:
            R = self.scales.repeat_interleave(self.block)[:, None] * R
        return R if self.others is None else torch.where(self.others[0], R, self.others[1])

    def named(self, m: str) -> dict[str, nn.Parameter]:
        """What trains of it in a module."""
        return {m: self.R} | ({} if self.scales is None else {f"{m}, scales": self.scales})

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inner = A(module.lora_dropout[active_adapter](x))  # (..., r)
        inner = inner @ self.whole().T.to(inner)
        out: Tensor = result + B(inner) * module.scaling[active_adapter]
        return out


def inside(R: Tensor, block: int) -> Tensor:
    """1 in the diagonal blocks of this size of a core, 0 elsewhere; (r, r)."""
    blocks = [torch.ones(block, block)] * (len(R) // block)
    mask: Tensor = torch.block_diag(*blocks)
    return mask.to(R)


def masked(mask: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient * mask
