"""MELoRA: several small LoRAs side by side, of a higher rank at the same size. Multilinear.

Ren et al., "MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning", ACL 2024,
https://arxiv.org/abs/2402.17263

    n mini LoRAs, the i-th of the i-th part of the input and of the output:
    change = (alpha / r) diag(B_1, ..., B_n) diag(A_1, ..., A_n),  A_i (r, k / n), B_i (d / n, r)

of rank n r with r (d + k) numbers, where LoRA of rank n r has n r (d + k). All A_i are drawn, all
B_i are 0. Strategies see one A (n r, k / n) and one B (d / n, n r).

Differs from the paper: nothing known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.lora.forms.base import Sides, Tensors, uniform


@dataclass(frozen=True, slots=True)
class MELoRA:
    parts: int = 2
    """How many mini LoRAs; must divide both sides of every layer."""

    @property
    def scaled(self) -> bool:
        return True

    @property
    def sides(self) -> Sides | None:
        return Sides("A", "B")

    def frozen(self, W: Tensor, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        (d, k), n = W.shape, self.parts
        if n < 1 or d % n or k % n:
            raise ValueError(f"lora.options parts = {n}: must divide {d} and {k}, a layer's sizes")
        return {}

    def first(self, d: int, k: int, r: int, generator: torch.Generator) -> dict[str, Tensor]:
        n = self.parts
        return {"A": uniform(n * r, k // n, generator), "B": torch.zeros(d // n, n * r)}

    def pair(self, theta: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor]:
        A, B = theta["A"].chunk(self.parts), theta["B"].chunk(self.parts, 1)
        return torch.block_diag(*A), torch.block_diag(*B)
