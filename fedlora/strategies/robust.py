"""Which updates to trust, judged by what they do and never by how they are factored.

An update is D_i = s_i B_i A_i in every module, and (B M, M^-1 A) is the same update for any M:
norms and distances of A and B apart can be made anything without changing the model. So all of
this works on the Gram matrix of the updates,

    G_ij = <D_i, D_j> = sum over modules of s_i s_j trace(A_j^T B_j^T B_i A_i)

which takes r x r products only. A module that a client does not hold counts as 0 for it.

    kept  = krum(adapters, byzantine, keep)      those with the closest neighbours
    kept  = trimmed(adapters, weights, share)    without the farthest from the geometric median
    kept  = afa(adapters, weights)               without those that point elsewhere than the rest
    p     = geometric_median(adapters, weights)  weights whose mean is the geometric median

The coordinate-wise median and trimmed mean are not here: they depend on coordinates of D_i, so
they would need it dense. Pure functions; which strategy takes what they return is the caller's.
Where clients train on from a common adapter, judge the `change` of it: common to all, the start
would only make them look alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora.adapter import Adapter, Pair
from fedlora.lora.lowrank import gram as gram_of_pairs
from fedlora.lora.lowrank import stack


def change(trained: Adapter, before: Adapter) -> dict[str, Pair]:
    """What training added, module by module: trained - before, as pairs of twice the rank."""
    return {
        m: stack([x, before[m]], [1.0, -1.0]) if m in before else stack([x])
        for m, x in trained.items()
    }


def beside(trained: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Pair]:
    """What training added to tensors that are no factors, trained - before, each as a pair of rank
    1: its numbers in a row."""
    found = {}
    for name, x in trained.items():
        row = x.float() - before[name].float() if name in before else x.float()
        found[f"beside {name}"] = Pair(row.reshape(1, -1), row.new_ones(1, 1), 1.0)
    return found


def together(parts: Sequence[Sequence[Adapter]]) -> list[dict[str, Pair]]:
    """One change of each update from its parts (part, update), each in units of the part's median
    length, or where that is 0 of its greatest: no part hides behind another that is longer."""
    found: list[dict[str, Pair]] = [{} for _ in parts[0]]
    for part in parts:
        length = norms(part)
        unit = float(length.quantile(0.5)) or float(length.max()) or 1.0
        for whole, change in zip(found, part, strict=True):
            whole.update({m: replace(x, scale=x.scale / unit) for m, x in change.items()})
    return found


def gram(adapters: Sequence[Adapter]) -> Tensor:
    """G (n, n) of the updates, in float64."""
    G = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for m in {m: None for adapter in adapters for m in adapter}:
        held = [i for i, adapter in enumerate(adapters) if m in adapter]
        G[torch.tensor(held)[:, None], torch.tensor(held)] += gram_of_pairs(
            [adapters[i][m] for i in held]
        )
    return G


def norms(adapters: Sequence[Adapter]) -> Tensor:
    """||D_i||_F over all modules, (n,)."""
    return gram(adapters).diagonal().clamp(min=0).sqrt()


def krum(adapters: Sequence[Adapter], byzantine: int, keep: int = 1) -> list[int]:
    """The `keep` updates with the closest neighbours, in order (multi-Krum; keep = 1 is Krum).

    An update's score is the sum of its n - byzantine - 2 smallest squared distances (Blanchard
    et al., 2017, https://arxiv.org/abs/1703.02757).

    Raises:
        StrategyError: n < 2 byzantine + 3, where the attackers could outvote the others.
    """
    n = len(adapters)
    if n < 2 * byzantine + 3:
        raise StrategyError(
            f"krum against {byzantine} faulty clients needs at least {2 * byzantine + 3} updates, "
            f"and {n} came; lower the number of faulty clients or raise the cohort"
        )
    squared = squares(gram(adapters))
    squared.fill_diagonal_(math.inf)
    scores = squared.sort(dim=1).values[:, : n - byzantine - 2].sum(dim=1)
    return sorted(scores.argsort(stable=True)[:keep].tolist())


def geometric_median(
    adapters: Sequence[Adapter], weights: Sequence[float], steps: int = 100
) -> list[float]:
    """The p, of sum 1, for which sum_i p_i D_i minimises sum_i w_i ||D_i - X||.

    Weiszfeld's iteration (as in Pillutla et al., 2019, https://arxiv.org/abs/1912.13445): the
    minimiser lies in the convex hull of the updates, so p is all that has to be found. Breaks
    only where half of the weight is faulty. Distances are smoothed at 1e-9 of the largest norm.
    """
    return _centre(gram(adapters), torch.tensor(weights, dtype=torch.float64), steps).tolist()


def _centre(G: Tensor, w: Tensor, steps: int = 100) -> Tensor:
    """p of the geometric median, from the updates' Gram matrix and weights w."""
    p = w / w.sum()
    least = 1e-9 * float(G.diagonal().clamp(min=0).max()) ** 0.5
    if least == 0:
        return p
    for _ in range(steps):
        p = w / from_mean(G, p).clamp(min=least)
        p = p / p.sum()
    return p


def trimmed(adapters: Sequence[Adapter], weights: Sequence[float], share: float) -> list[int]:
    """All but the `share` of the updates that lie farthest from the geometric median, in order.

    Of n updates floor(share n) are left out, and never all of them.
    """
    G = gram(adapters)
    distance = from_mean(G, _centre(G, torch.tensor(weights, dtype=torch.float64)))
    keep = max(1, len(adapters) - int(share * len(adapters)))
    return sorted(distance.argsort(stable=True)[:keep].tolist())


XI, FURTHER = 2.0, 0.5
"""Standard deviations from the median at which `afa` leaves an update out, and by how many more
each time that it has: the paper's values."""


def afa(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[int]:
    """Those whose directions agree, in order, by adaptive federated averaging's rule.

    s_i is the cosine of D_i with the centre of those that are left. Of more that are low than high,
    mean(s) < median(s), those below median - xi std go, else those above median + xi std; then
    again with a xi that is greater by FURTHER, until none goes. So nobody has to go, and nobody
    says how many may.

    Source: Munoz-Gonzalez, Co and Lupu, "Byzantine-Robust Federated Machine Learning through
    Adaptive Model Averaging", 2019, https://arxiv.org/abs/1909.05125. Differs from it: the centre
    is the geometric median of the directions, D_i / ||D_i||, since one long update turns a mean; no
    reputation is kept from round to round, so no client is left out for good; more than half stay.
    """
    G, w = gram(adapters), torch.tensor(weights, dtype=torch.float64)
    length = G.diagonal().clamp(min=0).sqrt()
    directions = G / length.clamp(min=1e-150) / length.clamp(min=1e-150)[:, None]
    kept, xi = torch.arange(len(adapters)), XI
    while True:
        s = _cosines(directions[kept][:, kept], w[kept])
        middle, reach = s.quantile(0.5), xi * s.std(correction=0)
        out = s < middle - reach if s.mean() < middle else s > middle + reach
        if not bool(out.any()) or 2 * int((~out).sum()) <= len(adapters):
            return kept.tolist()
        kept, xi = kept[~out], xi + FURTHER


def _cosines(directions: Tensor, w: Tensor) -> Tensor:
    """Of each with the geometric median, (n,), from their Gram matrix; 0 of an update that is 0."""
    p = _centre(directions, w)
    return directions @ p / (p @ directions @ p).clamp(min=1e-300).sqrt()


def squares(G: Tensor) -> Tensor:
    """||D_i - D_j||^2, (n, n)."""
    size = G.diagonal()
    return (size[:, None] + size - 2 * G).clamp(min=0)


def from_mean(G: Tensor, p: Tensor) -> Tensor:
    """||D_i - sum_j p_j D_j||, (n,)."""
    return (G.diagonal() - 2 * G @ p + p @ G @ p).clamp(min=0).sqrt()
