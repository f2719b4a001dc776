"""A teacher for every client, whose best common model is known: see synthetic.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.strategies.base import seeded

SIZES = {"layers.0.proj": (24, 40), "layers.1.proj": (32, 20)}  # (d, k)
EXAMPLES = (60, 100, 40, 80, 120, 90)
TEACHER_RANK = 4
NOISE = 0.1


@dataclass(frozen=True)
class Teacher:
    """The clients' data as second moments, which is all that a squared loss needs."""

    W0: Mapping[str, Tensor]
    xx: Sequence[Mapping[str, Tensor]]
    """X X^T / n (k, k) of each client."""
    yx: Sequence[Mapping[str, Tensor]]
    """(Y - W0 X) X^T / n (d, k)."""
    yy: Sequence[float]

    def loss(self, client: int, change: Mapping[str, Tensor]) -> Tensor:
        """Mean over the client's examples of |Y - (W0 + change) X|^2."""
        total = torch.tensor(self.yy[client], dtype=torch.float64)
        for m, D in change.items():
            total = (
                total + ((D @ self.xx[client][m]) * D).sum() - 2 * (D * self.yx[client][m]).sum()
            )
        return total

    def everywhere(self, change: Mapping[str, Tensor]) -> float:
        """The loss over all clients' examples."""
        losses = [n * float(self.loss(i, change)) for i, n in enumerate(EXAMPLES)]
        return sum(losses) / sum(EXAMPLES)

    def floor(self) -> float:
        """The least loss of one model: W0 + (sum n yx) (sum n xx)^-1."""
        best = {}
        for m in SIZES:
            xx = sum(n * x[m] for n, x in zip(EXAMPLES, self.xx, strict=True))
            yx = sum(n * x[m] for n, x in zip(EXAMPLES, self.yx, strict=True))
            best[m] = torch.linalg.solve(xx, yx, left=False)
        return self.everywhere(best)


def make_task(seed: int, h: float) -> Teacher:
    """Teachers and data; h = 0 gives all clients one teacher."""
    W0, common, xx, yx, yy = {}, {}, [], [], []
    for m, (d, k) in SIZES.items():
        W0[m] = _noise((d, k), seed, -1, f"W0/{m}") / k**0.5
        common[m] = _low_rank(d, k, seed, -1, m)
    for i, n in enumerate(EXAMPLES):
        moments: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        square = 0.0
        for m, (d, k) in SIZES.items():
            X = _noise((k, n), seed, i, f"X/{m}")
            teacher = common[m] + h * _low_rank(d, k, seed, i, m)
            E = teacher @ X + NOISE * _noise((d, n), seed, i, f"E/{m}")  # Y - W0 X
            moments[0][m], moments[1][m] = X @ X.T / n, E @ X.T / n
            square += float(E.square().sum()) / n
        xx.append(moments[0])
        yx.append(moments[1])
        yy.append(square)
    return Teacher(W0, xx, yx, yy)


def _noise(size: Sequence[int], seed: int, client: int, purpose: str) -> Tensor:
    generator = seeded(seed, 0, client, f"teacher/{purpose}")
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def _low_rank(d: int, k: int, seed: int, client: int, m: str) -> Tensor:
    """A change of rank TEACHER_RANK whose entries have mean square 1 / k."""
    U = _noise((d, TEACHER_RANK), seed, client, f"U/{m}")
    V = _noise((TEACHER_RANK, k), seed, client, f"V/{m}")
    change: Tensor = U @ V / (TEACHER_RANK * k) ** 0.5
    return change
