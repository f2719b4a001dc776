"""LoRA-Pro: gradients of A and B with which a step on both is the best that they can do for W.

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025,
https://arxiv.org/abs/2407.18242

    G                       the gradient of W, of which only g_A = B^T G and g_B = G A^T are seen
    B h_A + h_B A           what W moves along when A and B move along h_A and h_B
    h_A = (B^T B)^+ g_A + X A
    h_B = (I - B (B^T B)^+ B^T) g_B (A A^T)^+ - B X

Whatever X, that sum is the nearest to G of all that are of this form; X, the solution of

    (B^T B) X + X (A A^T) = -(B^T B)^+ g_A A^T

keeps h_A and h_B nearest to g_A and g_B. Where B = 0, h_A is 0 and h_B is g_B (A A^T)^+.

Differs from the paper: without 1 / s^2, which all terms have and Adam divides out; Adam's moments
are of h_A and h_B, where the paper offers those of the sum, a d x k matrix; directions of B of less
than EPS of its largest, squared, count as 0.
"""

import torch
from torch import Tensor, nn

EPS = 1e-8
"""Eigenvalues of B^T B and A A^T below this share of the largest are 0."""


@torch.no_grad()
def adjust(A: nn.Parameter, B: nn.Parameter) -> None:
    """Put h_A and h_B in the place of both gradients; computed in float64."""
    assert A.grad is not None
    assert B.grad is not None
    a, b, ga, gb = (x.detach().double() for x in (A, B, A.grad, B.grad))
    if not all(bool(x.isfinite().all()) for x in (a, b, ga, gb)):
        return  # has diverged, which the loss says
    (m, U), (n, V) = torch.linalg.eigh(b.T @ b), torch.linalg.eigh(a @ a.T)
    m_inv, n_inv = _inverse(m), _inverse(n)
    whole = U @ (m_inv[:, None] * (U.T @ ga))  # (B^T B)^+ g_A
    gb_n = (gb @ V) * n_inv @ V.T  # g_B (A A^T)^+
    outside = gb_n - b @ (U @ (m_inv[:, None] * (U.T @ (b.T @ gb_n))))
    both = m[:, None] + n[None, :]
    right = U.T @ (whole @ a.T) @ V
    X = -U @ torch.where(both > 0, right / both.clamp(min=1e-300), 0.0) @ V.T
    A.grad.copy_(whole + X @ a)
    B.grad.copy_(outside - b @ X)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for what is 0 beside the largest."""
    kept = x > EPS * x.max().clamp(min=1e-300)
    return torch.where(kept, 1 / torch.where(kept, x, 1.0), 0.0)
