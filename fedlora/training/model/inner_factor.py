"""The r x r core between LoRA's factors, which PEFT does not have: Fed-SB's and RAVAN's R."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn


class Core(LoraVariant):  # type: ignore[misc]
    """x -> W0 x + s B R (A x): PEFT's extension point, with the r x r core between the factors."""

    def __init__(self, R: nn.Parameter) -> None:
        self.R = R

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inner = A(module.lora_dropout[active_adapter](x))  # (..., r)
        inner = inner @ self.R.T.to(inner)
        out: Tensor = result + B(inner) * module.scaling[active_adapter]
        return out


def inside(R: Tensor, block: int) -> Tensor:
    """1 in the diagonal blocks of this size of a core, 0 elsewhere; (r, r)."""
    blocks = [torch.ones(block, block)] * (len(R) // block)
    mask: Tensor = torch.block_diag(*blocks)
    return mask.to(R)


def masked(mask: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient * mask
