"""Exact algebra on pairs, in float32 at least. Only `accumulate` and `principal` see (d, k)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.lora.adapter import Delta, Pair, Stack, dense

ITERATIONS = 8
"""Passes of `leading_svd` over a stack; each brings the truncation nearer the best one."""


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: what sums, QR and SVD are done in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def weighted(pairs: Sequence[Pair], weights: Sequence[float]) -> Stack:
    """The exact weighted sum of the pairs' deltas, of rank R = sum of their ranks, not copied."""
    scale = tuple(w * p.scale for p, w in zip(pairs, weights, strict=True))
    return Stack(tuple(p.A for p in pairs), tuple(p.B for p in pairs), scale)


def stack(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """The weighted sum as one pair, A (R, k) and B (d, R)."""
    return weighted(pairs, weights or [1.0] * len(pairs)).pair()


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, R'), S (R'), Vh (R', k) of the pair's delta, R' = min(rank, d, k).

    With B = Q_B R_B and A^T = Q_A R_A, delta = Q_B (R_B R_A^T) Q_A^T, so the SVD of the small
    core is all it takes: O((d + k) R^2).
    """
    Q_B, R_B = torch.linalg.qr(pair.scale * wide(pair.B))  # (d, R'), (R', R)
    Q_A, R_A = torch.linalg.qr(wide(pair.A).T)  # (k, R''), (R'', R)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def compress(pair: Pair, rank: int) -> Pair:
    """The pair of at most this rank whose delta is nearest in Frobenius norm (Eckart-Young).

    S goes to B whole and A keeps orthonormal rows. Splitting S evenly gives the same delta, but
    where S is 0 it would zero a row of A and a column of B together: a direction that never
    learns.
    """
    U, S, Vh = leading_svd(pair, rank)
    return Pair(A=Vh[:rank].contiguous(), B=U[:, :rank] * S[:rank])


def leading_svd(pair: Pair, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples of the pair's delta: U (d, rank), S (rank), Vh (rank, k).

    Of a wide stack that little is kept of, by subspace iteration through the factors (Halko,
    Martinsson, Tropp 2011, algorithm 4.4): O((d + k) R rank) in place of O((d + k) R^2). `svd` is
    its oracle; the error of the truncation is within 1e-3 of the optimum's, relative.
    """
    width = 2 * rank + 16
    if min(pair.rank, pair.B.shape[0], pair.A.shape[1]) <= 3 * width:
        U, S, Vh = svd(pair)
        return U[:, :rank], S[:rank], Vh[:rank]
    A, B = wide(pair.A), wide(pair.B)
    generator = torch.Generator().manual_seed(0)  # which directions it starts from is immaterial
    start = torch.randn(A.shape[1], width, generator=generator).to(A)
    Q, _ = torch.linalg.qr(B @ (A @ start))  # (d, width)
    for _ in range(ITERATIONS):
        Q, _ = torch.linalg.qr(A.T @ (B.T @ Q))
        Q, _ = torch.linalg.qr(B @ (A @ Q))
    U, S, Vh = torch.linalg.svd(pair.scale * (Q.T @ B) @ A, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]


def mean_and_residual(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[Pair, Stack]:
    """Of equal-rank pairs, (Abar, Bbar) and what it misses, sum_i p_i D_i - Bbar Abar.

    What it misses is the covariance of the factors. Since sum_i p_i (B_i - Bbar) = 0, any A may be
    taken off the A_i, and with that of the last pair its term is none:

        residual = sum_{i < m} p_i (B_i - Bbar) (A_i - A_m)

    so m pairs leave (m - 1) r ranks, and nothing is written but the mean. It is at the first
    pair's scale, which other scales are folded into through B; a rank that is alike in all pairs
    is in it bit for bit. The weights p_i sum to 1.
    """
    scale = pairs[0].scale
    As = [p.A for p in pairs]
    Bs = [p.B if p.scale == scale else p.scale / scale * wide(p.B) for p in pairs]
    A, B = _mean(As, weights), _mean(Bs, weights)
    shares = tuple(w * scale for w in weights[:-1])
    centre = Pair(wide(As[-1]), B)  # so that differences are in float32 at least
    return Pair(A, B, scale), Stack(tuple(As[:-1]), tuple(Bs[:-1]), shares, centre)


def _mean(xs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean; of tensors that are all alike, their own bits."""
    mean, so_far = wide(xs[0]).clone(), weights[0]
    for x, w in zip(xs[1:], weights[1:], strict=True):
        so_far += w
        mean.lerp_(x.to(mean), w / so_far)
    return mean


def pad(pair: Pair, rank: int) -> Pair:
    """The same delta at a higher rank: zero rows of A, zero columns of B."""
    (r, k), d = pair.A.shape, pair.B.shape[0]
    A = torch.cat([pair.A, pair.A.new_zeros(rank - r, k)])
    B = torch.cat([pair.B, pair.B.new_zeros(d, rank - r)], dim=1)
    return Pair(A, B, pair.scale)


def tail(pair: Pair, rank: int) -> Pair:
    """What the leading `rank` ranks leave out of a pair's delta."""
    return Pair(pair.A[rank:], pair.B[:, rank:], pair.scale)


def pick(pair: Pair, ranks: Tensor) -> Pair:
    """Some ranks of a pair: these rows of A with these columns of B."""
    return Pair(pair.A[ranks], pair.B[:, ranks], pair.scale)


def extend(pair: Pair, whole: Pair, ranks: Tensor | None = None) -> Pair:
    """`whole` with the pair in place of these ranks, or of the leading ones; at its scale."""
    if ranks is None and pair.rank == whole.rank and pair.scale == whole.scale:
        A, B = wide(pair.A), wide(pair.B)
        return pair if A is pair.A and B is pair.B else Pair(A, B, whole.scale)
    ranks = torch.arange(pair.rank) if ranks is None else ranks
    A, B = wide(whole.A), wide(whole.B)
    A = A.index_copy(0, ranks, wide(pair.A).to(A))
    B = B.index_copy(1, ranks, (wide(pair.B) * (pair.scale / whole.scale)).to(B))
    return Pair(A, B, whole.scale)


def rescale(pair: Pair, scale: float) -> Pair:
    """The same delta, published at another scale: the ratio goes into B."""
    return Pair(pair.A, pair.B * (pair.scale / scale), scale)


def inner(x: Pair, y: Pair) -> Tensor:
    """<X, Y> = trace(X^T Y) of the two deltas, through r x r products."""
    products = (wide(x.B).T @ wide(y.B)) * (wide(x.A) @ wide(y.A).T)
    return x.scale * y.scale * products.sum()


def gram(pairs: Sequence[Pair]) -> Tensor:
    """inner(x, y) of each with each, (n, n), in float64 and in two products for all of them."""
    owner = torch.repeat_interleave(torch.tensor([p.rank for p in pairs]))
    A = torch.cat([p.A.double() for p in pairs])  # (R, k)
    B = torch.cat([p.B.double() * p.scale for p in pairs], dim=1)  # (d, R)
    products = (B.T @ B) * (A @ A.T)
    n = len(pairs)
    rows = products.new_zeros(n, len(A)).index_add_(0, owner, products)
    return rows.new_zeros(n, n).index_add_(1, owner, rows)


def norm(pair: Pair) -> Tensor:
    """Frobenius norm of the delta."""
    return inner(pair, pair).clamp(min=0).sqrt()


def complement(basis: Tensor, fresh: Tensor, rank: int) -> Tensor:
    """Orthonormal columns, `rank` in all: those of `basis`, then directions taken from `fresh`."""
    missing = rank - basis.shape[1]
    if missing <= 0:
        return basis[:, :rank]
    # Twice: after one projection of nearly parallel columns, rounding is left along the basis.
    for _ in range(2):
        fresh, _ = torch.linalg.qr(fresh - basis @ (basis.T @ fresh))
    return torch.cat([basis, fresh[:, :missing]], dim=1)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns (rows, columns)."""
    Q: Tensor
    Q, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
    return Q


def principal(
    W: Tensor, rank: int, generator: torch.Generator, exact_up_to: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, rank), S (rank), Vh (rank, k): the leading part of a base weight's SVD.

    Exact where the smaller side is at most `exact_up_to`; above it by subspace iteration
    (Halko, Martinsson, Tropp 2011, algorithm 4.4), which is good to the gap after the last
    singular value kept and costs O(d k rank) in place of O(d k min(d, k)).
    """
    W = wide(W)
    if min(W.shape) <= exact_up_to:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].contiguous()
    width = min(2 * rank + 10, *W.shape)
    Q, _ = torch.linalg.qr(W @ torch.randn(W.shape[1], width, generator=generator).to(W))
    for _ in range(4):
        Q, _ = torch.linalg.qr(W.T @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U[:, :rank], S[:rank].clone(), Vh[:rank].contiguous()


def accumulate(total: Tensor | None, delta: Delta) -> Tensor:
    """total + delta, dense. The one addition order that server and clients share, bit for bit."""
    change: Tensor = dense(delta)
    if total is not None:
        change = total + change
    return change
