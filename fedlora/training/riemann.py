"""RiemannLoRA's step: B A moves on the manifold of matrices of rank r, whatever its factors are.

Bogachev et al., "RiemannLoRA: A Unified Riemannian Framework for Ambiguity-Free LoRA
Optimization", 2025, https://arxiv.org/abs/2507.12142

    X = B A,  G its gradient, of which A and B show  g_B = G A^T (d, r)  and  g_A = B^T G (r, k)
    P_U = B B^+,  P_V = A^+ A                      the projections on X's columns and rows
    xi = G P_V + P_U G - P_U G P_V                 the gradient's part in the tangent space
    X <- the nearest matrix of rank r to  X - rate sqrt(d r) xi / |xi|,   as  B = U S, A = V^T

P_U G P_V = B (B^T B)^+ (g_A A^T) (A A^T)^+ A, and so on, so that no d x k matrix is made.

Differs from the paper: no momentum; the step's length is given, that of a step of Adam on B beside
an orthonormal A, so that one train.lr fits what is beside A and B; the start is lora.init, where
the paper takes one from the first gradient. Where B = 0, P_U is 0.
"""

import torch
from torch import nn

from fedlora.lora.adapter import Pair
from fedlora.lora.lowrank import svd


@torch.no_grad()
def moved_on_manifold(A: nn.Parameter, B: nn.Parameter, rate: float) -> None:
    """Move both factors by one step, from their gradients, in float64."""
    assert A.grad is not None
    assert B.grad is not None
    a, b, ga, gb = (x.detach().double() for x in (A, B, A.grad, B.grad))
    right = gb @ torch.linalg.pinv(a @ a.T, hermitian=True)  # (d, r): G P_V = right A
    left = torch.linalg.pinv(b.T @ b, hermitian=True) @ ga  # (r, k): P_U G = B left
    inside = torch.linalg.pinv(a @ a.T, hermitian=True) @ a  # A^+^T (r, k)
    left = left - (left @ a.T) @ inside  # less P_U G P_V
    xi = Pair(torch.cat([a, left]), torch.cat([right, b], 1))
    U, S, Vh = svd(xi)
    size = float(S.norm())
    if not size:
        return
    step = rate * (B.numel() ** 0.5) / size
    columns = torch.cat([b - step * right, -step * b], 1)
    U, S, Vh = svd(Pair(torch.cat([a, left]), columns))
    r = A.shape[0]
    A.copy_(Vh[:r])
    B.copy_(U[:, :r] * S[:r])
