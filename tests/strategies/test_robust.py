"""Outliers are found by what they do to the model, whatever factors they come in."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora.adapter import Pair
from fedlora.lora.lowrank import gram as gram_of_pairs
from fedlora.lora.lowrank import inner
from fedlora.strategies.robust import (
    afa,
    change,
    from_mean,
    geometric_median,
    gram,
    krum,
    norms,
    trimmed,
)

MODULES = {"a": (13, 13), "b": (17, 11), "c": (7, 19)}


def randn(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed: int, spread: float = 0.3, rank: int = 3) -> dict[str, Pair]:
    """A common direction, some noise of its own, a rank and a scale of its own."""
    found = {}
    for j, (m, (d, k)) in enumerate(MODULES.items()):
        A = randn(1, k, seed=j).repeat(rank, 1) + spread * randn(rank, k, seed=100 * seed + j)
        B = randn(d, 1, seed=50 + j).repeat(1, rank) + spread * randn(d, rank, seed=99 * seed + j)
        found[m] = Pair(A, B, 2.0 / rank)
    return found


def in_another_gauge(adapter: dict[str, Pair], seed: int, size: float = 1.0) -> dict[str, Pair]:
    """The same update in other factors, and at another scale."""
    found = {}
    for m, p in adapter.items():
        M = size * (randn(p.rank, p.rank, seed=seed) + 3 * torch.eye(p.rank))
        found[m] = Pair(torch.linalg.inv(M) @ p.A, p.B @ M * p.scale / 0.7, 0.7)
    return found


def flipped(adapter: dict[str, Pair], times: float = 1.0) -> dict[str, Pair]:
    return {m: Pair(p.A, -times * p.B, p.scale) for m, p in adapter.items()}


HONEST = [update(i, rank=2 + i % 3) for i in range(1, 8)]
ATTACKS = {
    "sign flip": [flipped(HONEST[0]), flipped(HONEST[1])],
    "boosted": [flipped(HONEST[0], -50), flipped(HONEST[1], -50)],
    "noise": [update(31, spread=9.0), update(32, spread=9.0)],
    "hidden in the gauge": [in_another_gauge(flipped(HONEST[0]), 5, 1e-3)] * 2,
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def test_the_gram_matrix_is_that_of_the_dense_updates() -> None:
    G = gram(HONEST)
    for i, x in enumerate(HONEST):
        for j, y in enumerate(HONEST):
            dense = sum((x[m].delta() * y[m].delta()).sum() for m in MODULES)
            assert_close(G[i, j], dense, rtol=1e-12, atol=1e-10)


def test_the_gram_of_many_pairs_is_the_inner_product_of_each_two() -> None:
    pairs = [x["b"] for x in HONEST]
    want = torch.stack([torch.stack([inner(x, y) for y in pairs]) for x in pairs])
    assert_close(gram_of_pairs(pairs), want, rtol=1e-12, atol=1e-10)


def test_a_module_that_a_client_lacks_counts_as_zero() -> None:
    lacking = {m: p for m, p in HONEST[0].items() if m != "b"}
    norm = sum(p.delta().square().sum() for p in lacking.values()).sqrt()
    assert_close(norms([HONEST[1], lacking])[1], norm)


def test_an_update_in_another_gauge_is_the_same_update() -> None:
    twin = in_another_gauge(HONEST[0], seed=3, size=40.0)
    assert (twin["a"].B.norm() / HONEST[0]["a"].B.norm() - 1).abs() > 1  # its factors are not
    squared = gram([HONEST[0], twin])
    assert_close(squared, squared[0, 0].expand(2, 2), rtol=1e-9, atol=0)


def test_every_verdict_is_the_same_in_any_gauge() -> None:
    cohort = [*HONEST, *ATTACKS["sign flip"]]
    turned = [in_another_gauge(x, seed=i, size=10.0**i) for i, x in enumerate(cohort)]
    w = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 3.5]
    assert krum(cohort, 2, 4) == krum(turned, 2, 4)
    assert trimmed(cohort, w, 0.25) == trimmed(turned, w, 0.25)
    assert afa(cohort, w) == afa(turned, w)
    assert_close(norms(cohort), norms(turned), rtol=1e-6, atol=0)
    assert geometric_median(cohort, w) == pytest.approx(geometric_median(turned, w), abs=1e-6)


@every_attack
def test_krum_keeps_honest_updates_only(attack: list) -> None:
    cohort = [attack[0], *HONEST, attack[1]]
    assert all(0 < i < len(cohort) - 1 for i in krum(cohort, byzantine=2, keep=5))
    (chosen,) = krum(cohort, byzantine=2)
    assert 0 < chosen < len(cohort) - 1


@every_attack
def test_trimming_leaves_the_attackers_out(attack: list) -> None:
    cohort = [attack[0], *HONEST, attack[1]]
    assert trimmed(cohort, [1.0] * len(cohort), share=0.23) == list(range(1, len(cohort) - 1))


@pytest.mark.parametrize("attack", ["sign flip", "noise", "hidden in the gauge"])
def test_afa_leaves_out_those_that_point_elsewhere(attack: str) -> None:
    first, second = ATTACKS[attack]
    cohort = [first, *HONEST, second]
    assert {0, len(cohort) - 1}.isdisjoint(afa(cohort, [1.0] * len(cohort)))


def test_afa_sees_no_length_which_is_what_the_bounds_are_for() -> None:
    cohort = [flipped(HONEST[0], -50), *HONEST]
    assert 0 in afa(cohort, [1.0] * len(cohort))


def test_afa_leaves_nobody_out_where_all_agree_and_trimming_does() -> None:
    alike = [flipped(HONEST[0], -times) for times in (1, 2, 3, 5, 8)]
    assert afa(alike, [1.0] * 5) == [0, 1, 2, 3, 4]
    assert len(trimmed(alike, [1.0] * 5, share=0.2)) == 4


def test_more_than_half_always_stay_under_afa() -> None:
    still = [flipped(x, 0.0) for x in HONEST]
    assert afa(still, [1.0] * 7) == list(range(7))
    for seed in range(5):
        apart = [update(i, spread=20.0) for i in range(40 * seed, 40 * seed + 9)]
        assert 2 * len(afa(apart, [1.0] * 9)) > 9
    assert afa(HONEST[:1], [1.0]) == [0]


def slow_afa(cohort: list[Any], weights: list[float]) -> list[int]:
    """The definition, on dense vectors, its centre by a general minimiser."""
    dense = [np.concatenate([(p.scale * p.B @ p.A).numpy().ravel() for p in x.values()])
             for x in cohort]  # fmt: skip
    dense = [x / np.linalg.norm(x) for x in dense]
    kept, xi = list(range(len(cohort))), 2.0
    while True:
        D, w = np.stack([dense[i] for i in kept]), np.array([weights[i] for i in kept])

        def far(p: Any, D: Any = D, w: Any = w) -> float:
            return float(w @ np.linalg.norm(D - p @ D, axis=1))

        start = np.full(len(kept), 1 / len(kept))
        whole = {"type": "eq", "fun": lambda p: p.sum() - 1}
        found = minimize(far, start, constraints=[whole], tol=1e-12, options={"maxiter": 500})
        centre = found.x @ D
        s = D @ centre / np.linalg.norm(centre)
        low, high = np.median(s) - xi * np.std(s), np.median(s) + xi * np.std(s)
        out = s < low if np.mean(s) < np.median(s) else s > high
        if not out.any() or 2 * (~out).sum() <= len(cohort):
            return kept
        kept, xi = [i for i, gone in zip(kept, out, strict=True) if not gone], xi + 0.5


def test_afa_is_its_definition_on_dense_updates() -> None:
    seen = set()
    for seed in range(8):
        cohort = [update(20 * seed + i, spread=0.2 + 0.4 * (i % 4)) for i in range(8)]
        for i in range(seed % 3):
            cohort[i] = flipped(cohort[i], 3.0)
        weights = [1.0 + (i + seed) % 3 for i in range(8)]
        kept = afa(cohort, weights)
        assert kept == slow_afa(cohort, weights)
        seen.add(len(kept))
    assert len(seen) > 1, "every cohort lost as many, so a fixed share would do"


@every_attack
def test_the_geometric_median_stays_near_the_honest_mean(attack: list) -> None:
    cohort = [*attack, *HONEST]
    G, n = gram(cohort), len(cohort)
    honest = torch.tensor([0.0, 0.0] + [1 / len(HONEST)] * len(HONEST), dtype=torch.float64)
    p = torch.tensor(geometric_median(cohort, [1.0] * n), dtype=torch.float64)
    mean = torch.full((n,), 1 / n, dtype=torch.float64)

    def from_honest(q: torch.Tensor) -> float:
        return float(((q - honest) @ G @ (q - honest)).sqrt())

    assert from_honest(p) < from_honest(mean)
    assert p[:2].sum() < 2 / n


def test_the_geometric_median_minimises_the_weighted_distances() -> None:
    w = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0], dtype=torch.float64)
    G = gram(HONEST)
    p = torch.tensor(geometric_median(HONEST, w.tolist()), dtype=torch.float64)
    best = w @ from_mean(G, p)
    for seed in range(20):
        step = 1e-3 * randn(len(w), seed=seed)
        assert w @ from_mean(G, p + step - step.mean()) >= best - 1e-9
    assert_close(p.sum().item(), 1.0)


def test_the_geometric_median_of_one_or_of_nothing_is_the_plain_weight() -> None:
    assert geometric_median([HONEST[0]], [3.0]) == [1.0]
    nothing = [flipped(HONEST[0], 0.0), flipped(HONEST[1], 0.0)]
    assert geometric_median(nothing, [1.0, 3.0]) == [0.25, 0.75]


def test_krum_refuses_more_attackers_than_it_can_outvote() -> None:
    with pytest.raises(StrategyError, match="needs at least 9 updates, and 7 came"):
        krum(HONEST, byzantine=3)


def test_trimming_never_leaves_nothing() -> None:
    assert len(trimmed(HONEST, [1.0] * len(HONEST), share=1.0)) == 1
    assert trimmed(HONEST, [1.0] * len(HONEST), share=0.0) == list(range(len(HONEST)))


def test_change_is_what_training_added() -> None:
    before, trained = HONEST[0], {m: HONEST[1][m] for m in ("a", "b")}
    added = change(trained, before)
    assert added.keys() == trained.keys()
    for m, p in added.items():
        assert_close(p.delta(), trained[m].delta() - before[m].delta(), rtol=0, atol=1e-12)
    assert change(trained, {})["a"].rank == trained["a"].rank


def cosines(adapters: list) -> torch.Tensor:
    """cos(D_i, D_j), (n, n)."""
    size = norms(adapters)
    return gram(adapters) / (size[:, None] * size)


def test_attackers_are_seen_in_the_change_where_the_start_would_hide_them() -> None:
    """All clients go on from one large common adapter: their sums look alike, their changes not."""
    start = {m: Pair(p.A, 1e3 * p.B, p.scale) for m, p in update(77).items()}
    ended = []
    for added in [*HONEST, *ATTACKS["sign flip"]]:
        pairs = {m: (start[m], added[m]) for m in MODULES}
        ended.append(
            {
                m: Pair(torch.cat([x.A, y.A]), torch.cat([x.B * x.scale, y.B * y.scale], 1))
                for m, (x, y) in pairs.items()
            }
        )
    assert cosines(ended).min() > 0.99
    assert cosines([change(x, start) for x in ended]).min() < -0.5
