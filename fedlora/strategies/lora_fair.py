"""LoRA-FAIR: correct the averaged B so that B Abar comes nearest to the mean of the updates.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", ICCV 2025, https://arxiv.org/abs/2411.14961

    client i   trains A_i, B_i from (Abar, Bbar + D); sends both
    server     dW = sum_i p_i (s_i / s) B_i A_i
               D  = argmin  distance(dW, (Bbar + D) Abar) + lambda ||D||^2

`mode` = "ridge", squared Frobenius distance, has the closed form, with no d x k matrix in it:

    D = M (G + lambda I)^-1,   G = Abar Abar^T,   M = sum_i p_i (s_i / s) B_i (A_i Abar^T) - Bbar G

lambda = lambda_rel trace(G) / r makes it scale-free; lambda -> inf is FedAvg, lambda -> 0 leaves
dW (I - P) with P the projection on the rows of Abar. `mode` = "cosine" is the paper's form,
1 - cos of the whole matrices; "cosine-columns" is that of public code, 1 - the mean of the cosines
of their k columns. Both see no magnitude, so they can leave a wrong one.

Deviation from (E): the part of dW that no B can reach with Abar; less than FedAvg's.
Costs, a layer and client: up r (d + k), down r (d + k).

Source: a third party's re-implementation and a paper note; the authors' code was not read.
Differs from the paper: the ridge form by default; a cosine of the whole matrices, and one by
columns to compare with; a fixed point for SGD; lambda's units; unequal ranks are refused; folded
scales; p_i.
Reasons and costs: docs/strategies/lora-fair.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import norm, stack, wide
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Upload,
    mean,
    part,
    uneven,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import by_module

STEPS, STEPS_BY_COLUMN = 30, 300
"""Iterations of the cosine forms, at most."""


def ridge(T: Tensor, B: Tensor, G: Tensor, lambda_rel: float) -> Tensor:
    """D (d, r) of the squared distance, from T = dW Abar^T (d, r)."""
    e, V = torch.linalg.eigh(G)  # G = V e V^T
    e = e + lambda_rel * G.trace() / len(G)
    reached = e > e.max() * len(e) * torch.finfo(e.dtype).eps
    inverse = torch.where(reached, 1 / e, 0)
    D: Tensor = ((T - B @ G) @ V * inverse) @ V.T
    return D


def cosine(T: Tensor, B: Tensor, G: Tensor, size: Tensor, lam: float) -> Tensor:
    """D (d, r) of 1 - cos + lam ||D||^2 in units of ||Bbar Abar||; size = ||dW||.

    With X = Bbar + D, u = <X, T> and v = ||X Abar||, the gradient is zero where
    X (u / v^3 G + 2 lam size I) = T / v + 2 lam size Bbar. Iterated on u and v.
    """
    e, V = torch.linalg.eigh(G)
    unit = ((B @ G) * B).sum().clamp(min=0).sqrt()  # ||Bbar Abar||
    if not (unit > 0 and size > 0):
        return torch.zeros_like(B)
    T, X0 = T @ V, B @ V / unit
    X, pull = X0, 2 * lam * size
    for _ in range(STEPS):
        u, v = (X * T).sum().clamp(min=0), (X.square() * e).sum().sqrt()
        stiff = (u / v**3) * e + pull
        moved = (T / v + pull * X0) / stiff
        X = torch.where(stiff > stiff.max() * torch.finfo(e.dtype).eps, moved, X0)
        along = (X * X0).sum()  # cos sees no magnitude, so lam ||D||^2 alone sets it
        X = X * (along / X.square().sum()) if along > 0 else X
    D: Tensor = (X - X0) * unit @ V.T
    return D


def cosine_columns(whole: Pair, A: Tensor, B: Tensor, lam: float) -> Tensor:
    """D (d, r) of 1 - mean_j cos(dW[:, j], ((Bbar + D) Abar)[:, j]) + lam ||D||^2, D in units of
    ||Bbar Abar||; `whole` is dW in factors.

    A column of dW that is zero has no direction and is left out. With a_j the columns of Abar, w_j
    those of dW and c_j their cosines, the gradient is zero where, for pull = 2 lam k,

        X (sum_j c_j / |X a_j|^2 a_j a_j^T + pull) = sum_j w_j a_j^T / (|w_j| |X a_j|) + pull Bbar

    Iterated on the lengths and cosines, with the columns of c_j < 0 on the right, through the
    factors: no d x k matrix is formed. In float64, as a column whose cosine is negative goes
    through a length of almost 0; one that has none has no cosine, and is left out of that step.
    """
    A, B = A.double(), B.double()
    U, V = whole.B.double() * whole.scale, whole.A.double()  # (d, R), (R, k)
    unit, eps = norm(Pair(A, B)), torch.finfo(torch.float64).eps
    sizes = ((U.T @ U @ V) * V).sum(0).clamp(min=0).sqrt()  # (k), of dW's columns
    seen = sizes > sizes.max() * torch.finfo(whole.A.dtype).eps
    if not (unit > 0 and seen.any()):
        return torch.zeros_like(B)
    a, v, X0 = A[:, seen], V[:, seen] / sizes[seen], B / unit
    X, pull = X0, 2 * lam * a.shape[1]
    for _ in range(STEPS_BY_COLUMN):
        squared = ((X.T @ X @ a) * a).sum(0)
        lengths = squared.where(squared > squared.max() * len(X) * eps, torch.inf).sqrt()
        c = ((X.T @ U @ v) * a).sum(0) / lengths
        towards, away = (a * (x.clamp(min=0) / lengths**2) @ a.T for x in (c, -c))
        right = U @ ((v / lengths) @ a.T) + pull * X0 + X @ away
        stiff = towards + pull * torch.eye(len(a), dtype=a.dtype)
        moved: Tensor = torch.linalg.solve(stiff, right, left=False)
        along = (moved * X0).sum()  # cos sees no magnitude, so lam ||D||^2 alone sets it
        moved = moved * (along / moved.square().sum()) if along > 0 else moved
        settled = (moved - X).norm() <= 4 * eps * X.norm()
        X = moved
        if settled:
            break
    return (X - X0) * unit


@dataclass(frozen=True, slots=True)
class LoRAFair:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 1e-2}, few={"classification": 1e-2}
    )
    mode: Literal["ridge", "cosine", "cosine-columns"] = "ridge"
    lambda_rel: float = 0.01
    """Weight of ||D||^2: relative to trace(G) / r in "ridge", the paper's lambda in the others."""

    def needs(self) -> Needs:
        return Needs(equal_ranks=True)

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := uneven(clients):
            yield f"lora-fair corrects one B for all ranks, but {gap}; use flexlora or fedex"
        if self.lambda_rel < 0:
            yield (
                f"strategy.lora-fair.lambda-rel = {self.lambda_rel}: must not be negative; use 0.01"
            )

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        return Download(part(state, client), frozenset({"A", "B", "other"}))

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        uploads = list(uploads)  # the correction needs Abar first, then every pair again
        after = mean(uploads, state)
        corrected = dict(after.B)
        for m, (pairs, p) in by_module(uploads, lambda u: u.sent.adapter()).items():
            A, B, s = wide(after.A[m]), wide(after.B[m]), state.scale[m]
            T = torch.zeros_like(B)  # dW Abar^T (d, r), client by client
            for x, w in zip(pairs, p, strict=True):
                T += (w * x.scale / s) * wide(x.B) @ (wide(x.A) @ A.T)
            corrected[m] = (B + self._correction(T, A, B, pairs, p, s)).to(after.B[m])
        return replace(after, B=corrected)

    def _correction(
        self, T: Tensor, A: Tensor, B: Tensor, pairs: list[Pair], p: list[float], s: float
    ) -> Tensor:
        G = A @ A.T
        if self.mode == "ridge":
            return ridge(T, B, G, self.lambda_rel)
        whole = stack(pairs, p)
        if self.mode == "cosine-columns":
            return cosine_columns(whole, A, B, self.lambda_rel)
        return cosine(T, B, G, norm(whole) / s, self.lambda_rel)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
