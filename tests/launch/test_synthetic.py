"""Every strategy on a teacher whose best model is known: a regression test of behaviour."""

from functools import cache

import pytest
import torch

from fedlora.launch.simulate.synthetic import Outcome, compare, markdown
from fedlora.launch.simulate.teacher import EXAMPLES, make_task
from fedlora.strategies import STRATEGIES

GENERAL = {"fedavg", "fedex", "flora", "flexlora", "rolora", "fslora"}
"""Strategies whose model can be any of the teacher's rank; a fixed A or core keeps others away."""


@cache
def outcome(name: str, ranks: tuple[int, ...] = (4,)) -> Outcome:
    found = compare([name], ranks, rounds=3, steps=4, rates=(0.03,))
    return next(iter(found))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_and_keeps_its_promise(name: str) -> None:
    o = outcome(name)
    assert not o.refused
    assert o.excess < 1  # better than the untrained model
    assert o.down > 0 < o.up
    promise = STRATEGIES[name]().promise
    if promise != "approximate":
        assert o.deviation < 2e-5


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_mixed_ranks_are_run_or_refused_with_what_to_use(name: str) -> None:
    o = outcome(name, (4, 8, 12))
    if STRATEGIES[name]().needs().equal_ranks:
        assert "use " in o.refused
    else:
        assert not o.refused
        assert o.excess < 1


def test_averaging_factors_apart_misses_what_exact_aggregation_does_not() -> None:
    assert outcome("fedavg").deviation > 1e-3 > outcome("fedex").deviation


def test_at_one_rank_a_sketch_of_all_ranks_is_the_plain_average() -> None:
    assert outcome("fslora").excess == pytest.approx(outcome("fedavg").excess, rel=1e-9)


def test_training_one_factor_at_a_time_halves_the_upload() -> None:
    assert outcome("rolora").up == pytest.approx(outcome("fedavg").up / 2, rel=0.1)


def test_a_fixed_A_cannot_leave_its_row_space() -> None:  # noqa: N802
    assert outcome("ffa").excess > max(outcome(n).excess for n in GENERAL)


def test_models_of_their_own_serve_clients_better_than_the_mean_of_them() -> None:
    o = outcome("fedsa")
    assert o.own < o.excess


def test_the_floor_is_the_least_loss_of_one_model() -> None:
    task = make_task(3, 0.5)
    floor, zero = task.floor(), task.everywhere({})
    assert floor < zero
    generator = torch.Generator().manual_seed(0)
    for m, W in task.W0.items():
        step = 1e-3 * torch.randn(W.shape, generator=generator, dtype=torch.float64)
        assert task.everywhere({m: step}) > floor


def test_without_heterogeneity_the_floor_is_the_noise() -> None:
    same, apart = make_task(0, 0.0), make_task(0, 1.0)
    assert same.floor() < 0.2 * apart.floor()
    assert len(same.xx) == len(EXAMPLES)


def test_the_table_names_every_result_and_every_refusal() -> None:
    text = markdown([outcome("fedex"), Outcome("fedavg", (4,), refused="because")])
    assert "| fedex | exact | 0.03 |" in text
    assert "- fedavg: because" in text
