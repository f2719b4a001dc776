"""Averages where clients hold different ranks of the same factors.

Rank j of a module is row j of A with column j of B. A client that holds only some ranks says
which (`rows`); by default its r_i ranks are the leading ones of the global r.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from fedlora.lora.adapter import COLUMNS, Adapter, Factors, Pair
from fedlora.lora.lowrank import complement, pad, wide
from fedlora.strategies.base import Layer, Upload, narrow

Absent = Literal["unchanged", "skipped", "zero"]
"""What a client says about a rank it does not hold: that it stays, nothing, or that it is 0."""

Rows = Callable[[Upload, str], Tensor]
"""The global ranks that an upload's rows of A and columns of B are, by upload and module."""


def leading(upload: Upload, module: str) -> Tensor:
    """The first r_i ranks."""
    A, B = upload.sent.A.get(module), upload.sent.B.get(module)
    return torch.arange(A.shape[0] if A is not None else B.shape[1] if B is not None else 0)


def subset(r: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of r ranks, drawn without replacement, in ascending order."""
    return torch.randperm(r, generator=generator)[:size].sort().values


def others(r: int, ranks: Tensor) -> Tensor:
    """The ranks of r that are not among these."""
    left = torch.ones(r, dtype=torch.bool)
    left[ranks] = False
    return left.nonzero().flatten()


def fit(mean: Pair, fresh: Tensor, layer: Layer) -> Pair:
    """The leading ranks of a pair with orthonormal A, as many as the client's layer has.

    Where the pair has too few, rows from `fresh` (r, k) make them up, orthogonal to its own and
    with B = 0: zeros in both would be directions that never learn.
    """
    missing = layer.rank - mean.rank
    if missing <= 0:
        return narrow(mean, layer)
    A = complement(wide(mean.A).T, wide(fresh).T, layer.rank).T.contiguous()
    return narrow(Pair(A.to(mean.A), pad(mean, layer.rank).B, mean.scale), layer)


def mean_ranks(
    uploads: Iterable[Upload],
    before: Factors,
    absent: Absent,
    rows: Rows = leading,
    weight: Callable[[Upload, str], float] | None = None,
) -> Factors:
    """A and B averaged rank by rank, and the rest whole, in one pass that holds one upload.

    With w_i the weight (n_i unless given), W its sum over the clients that sent the module and
    W_j the sum over those that hold rank j,

        unchanged   (sum_i w_i x_ij + (W - W_j) x_j) / W
        skipped     sum_i w_i x_ij / W_j
        zero        sum_i w_i x_ij / W

    Scales are folded into B. A rank that no one holds stays bit for bit, under "zero" too: zeros
    in A and in B would be a direction that never learns again.
    Summed in float32 at least, returned in the dtype of `before`; what no one sent is carried.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    held: dict[tuple[str, str], Tensor] = {}
    by_width: dict[tuple[str, str], dict[int, float]] = {}  # of those that hold the first n
    totals: dict[tuple[str, str], float] = {}
    for u in uploads:
        for column, name, x in u.sent.items():
            key, old = (column, name), getattr(before, column)[name]
            by_rank = column in ("A", "B")
            dim = 1 if column == "B" else 0
            w = float(u.num_examples) if weight is None or not by_rank else weight(u, name)
            if key not in sums:
                sums[key] = torch.zeros_like(old, dtype=wide(old[:0]).dtype)
                held[key] = sums[key].new_zeros(old.shape[dim] if by_rank else 1)
                totals[key], by_width[key] = 0.0, {}
            totals[key] += w
            ratio = u.sent.scale[name] / before.scale[name] if column == "B" else 1.0
            if not by_rank or rows is leading:  # one pass over x, and no temporary
                n = x.shape[dim] if by_rank else 1
                total = sums[key].narrow(dim, 0, n) if x.shape != sums[key].shape else sums[key]
                total.add_(x, alpha=w * ratio)
                by_width[key][n] = by_width[key].get(n, 0.0) + w
            else:
                index = rows(u, name)
                sums[key].index_add_(dim, index, x.to(sums[key]), alpha=w * ratio)
                held[key].index_add_(0, index, torch.full_like(index, w, dtype=held[key].dtype))
    columns = {c: dict(getattr(before, c)) for c in COLUMNS}
    for (column, name), total in sums.items():
        old, hits, W = columns[column][name], held[column, name], totals[column, name]
        if W == 0:
            continue
        for n, w in by_width[column, name].items():
            hits[:n] += w
        if column in ("A", "B"):
            hits = hits.view((1, -1) if column == "B" else (-1, 1))
        if absent == "unchanged" and not bool((hits == W).all()):
            total = total + (W - hits) * wide(old)
        there = hits > 0
        mean = total / (torch.where(there, hits, 1) if absent == "skipped" else W)
        columns[column][name] = torch.where(there, mean.to(old.dtype), old)
    return Factors(before.scale, **columns)


def by_module(
    uploads: Iterable[Upload], pairs: Callable[[Upload], Adapter]
) -> dict[str, tuple[list[Pair], list[float]]]:
    """By module, the pairs of the clients that hold it and their p_i, which sum to 1 there."""
    found: dict[str, tuple[list[Pair], list[float]]] = {}
    for u in uploads:
        if u.num_examples == 0:
            continue
        for m, pair in pairs(u).items():
            held, counts = found.setdefault(m, ([], []))
            held.append(pair)
            counts.append(u.num_examples)
    return {m: (held, [n / sum(counts) for n in counts]) for m, (held, counts) in found.items()}
