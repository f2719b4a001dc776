"""Ranks by module that the server shares out: within the budget, and where the change is."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest

from fedlora.federation.server.adaptive import allocate
from tests.support.long import few
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
ADAPTIVE = {"ranks.policy": "adaptive", "clients.ranks": "4"}
TAKES = ["fedex", "flora", "fslora", "hetlora", "flexlora", "raflora", "florist", "rolora",
         "fedsvd", "fed-plora"]  # fmt: skip


def spectra(n: int, seed: int, length: int = 6) -> dict[str, list[float]]:
    chance = random.Random(seed)
    return {f"m{i}": sorted((chance.random() for _ in range(length)), reverse=True)
            for i in range(n)}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_of_modules_of_one_size_the_most_energy_that_the_budget_buys_is_kept(seed: int) -> None:
    """Against all ways to share it out."""
    S, sizes, most = spectra(3, seed), dict.fromkeys(["m0", "m1", "m2"], 10), 4
    found = allocate(S, sizes, dict.fromkeys(sizes, most), 70)

    def energy(ranks: dict[str, int]) -> float:
        return sum(x * x for m, r in ranks.items() for x in S[m][:r])

    ways = (r for r in itertools.product(range(1, most + 1), repeat=3) if sum(r) <= 7)
    every = (dict(zip(sizes, r, strict=True)) for r in ways)
    assert energy(found) == pytest.approx(max(map(energy, every)))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_keep_to_the_budget_and_their_limits_and_none_that_fits_is_left(seed: int) -> None:
    chance = random.Random(seed)
    S = spectra(5, seed)
    sizes = {m: chance.choice([5, 8, 21]) for m in S}
    most = {m: chance.randint(1, 6) for m in S}
    budget = 2 * sum(sizes.values())
    found = allocate(S, sizes, most, budget)
    left = budget - sum(r * sizes[m] for m, r in found.items())
    assert left >= 0
    assert all(1 <= r <= most[m] for m, r in found.items())
    assert all(r == most[m] or sizes[m] > left for m, r in found.items())


def test_a_module_that_did_not_move_keeps_one_rank_and_what_moved_has_its_bytes() -> None:
    sizes = {"still": 10, "moves": 10}
    S = {"still": [0.0, 0.0, 0.0, 0.0], "moves": [4.0, 3.0, 2.0, 1.0, 0.5, 0.25]}
    assert allocate(S, sizes, dict.fromkeys(sizes, 8), 80) == {"still": 2, "moves": 6}
    assert allocate(S, sizes, dict.fromkeys(sizes, 8), 60) == {"still": 1, "moves": 5}
    assert allocate({}, sizes, dict.fromkeys(sizes, 8), 80) == {"still": 4, "moves": 4}


@pytest.mark.parametrize("name", few(TAKES, "fedex", "flexlora"))
def test_a_run_of_ranks_that_change_is_what_its_strategy_promises(
    settings: Settings, name: str
) -> None:
    """No round is dearer than LoRA of the client's own rank, and some module has more of it."""
    given = settings(**quick(name, **ADAPTIVE, **{"run.rounds": 4, "output.keep-updates": True}))
    ran = federate(given)
    assert not any(r["failures"] for r in ran.rounds)
    plans = [r["ranks"]["4"] for r in ran.rounds[1:]]
    assert len({tuple(p.values()) for p in plans}) > 1 or len(set(plans[0].values())) > 1
    assert any(rank > 4 for plan in plans for rank in plan.values())
    if name not in ("rolora", "fedsvd"):  # they send one factor of the two
        sent = [ran.update(i, 0)[0] for i in range(1, 5)]
        numbers = [sum(x.numel() for n, x in t.items() if n.endswith((".A", ".B"))) for t in sent]
        assert max(numbers) == numbers[0]
    for r in ran.rounds[1:]:
        if r["proof"]["promise"] == "exact":
            assert r["proof"]["deviation"] < 2e-5


def test_the_next_rounds_ranks_are_those_of_the_mean_change(settings: Settings) -> None:
    """From the updates on disk: dense changes, NumPy's SVD, and one rank after the other."""
    given = settings(**quick("flora", **ADAPTIVE, **{"run.rounds": 1, "output.keep-updates": True}))
    ran = federate(given)
    came = [ran.update(1, i) for i in range(3)]  # flora's clients begin at B = 0
    modules = [n.removesuffix(".A") for n in came[0][0] if n.endswith(".A")]
    gain, size, most = {}, {}, {}
    for m in modules:
        D = sum(
            notes["num_examples"] * notes["scale"][m] * x[f"{m}.B"].double() @ x[f"{m}.A"].double()
            for x, notes in came
        ).numpy()
        size[m], most[m] = sum(D.shape), min(8, *D.shape)
        seen = np.linalg.svd(D, compute_uv=False)[:4] ** 2 / size[m]
        gain[m] = [*seen, *[seen[-1]] * 4]
    ranks, left = dict.fromkeys(modules, 1), 3 * sum(size.values())
    while fits := [m for m in modules if size[m] <= left and ranks[m] < most[m]]:
        best = max(fits, key=lambda m: gain[m][ranks[m]])
        ranks[best] += 1
        left -= size[best]
    assert ran.rounds[1]["ranks"]["4"] == ranks
    assert set(ranks.values()) != {4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedex", "hetlora"])
def test_a_resumed_run_has_the_same_ranks_and_bits(settings: Settings, name: str) -> None:
    long = {**ADAPTIVE, "run.rounds": 4, "train.lr-schedule": "constant"}
    whole = federate(settings(**quick(name, **long, **{"run.name": "whole"})))
    given = settings(**quick(name, **{**long, "run.rounds": 2}))
    federate(given)
    again = federate({**given, "run.rounds": 4, "run.resume": True})
    assert [r["ranks"] for r in again.rounds[1:]] == [r["ranks"] for r in whole.rounds[1:]]
    adapter = "adapter/adapter_model.safetensors"
    assert (again.directory / adapter).read_bytes() == (whole.directory / adapter).read_bytes()
