"""Server optimisers against their equations, and what they must leave alone."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Round, Start
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsvd import FedSVD
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.rolora import RoLoRA
from fedlora.strategies.server_optimizers import (
    SERVER_OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    Moments,
    problem,
    step,
    stepped,
)
from tests.support.strategy_federation import (
    EQUAL,
    MODULES,
    PARTIAL,
    SQUARE,
    fitting,
    make_start,
    noise,
    play,
)

ALL = (0, 1, 2, 3)
BOTH = frozenset({"A", "B", "other"})
every_optimizer = pytest.mark.parametrize("name", SERVER_OPTIMIZERS)


def one(x: Tensor) -> Factors:
    return Factors({"m": 1.0}, {"m": x})


def walked(optimizer: Any, rounds: int, x: Tensor) -> list[Tensor]:
    """x after each round, whose means are x plus noise."""
    moments, found = Moments(), []
    for r in range(rounds):
        mean = one(x + noise(x.shape, 0, r, "round"))
        after, moments = step(optimizer, moments, one(x), mean, frozenset({"A"}))
        x = after.A["m"]
        found.append(x)
    return found


def expected(optimizer: Any, rounds: int, x: Tensor) -> list[Tensor]:
    """The paper's algorithm 2, line by line."""
    m, found = torch.zeros_like(x), []
    tau = getattr(optimizer, "tau", 0.0)
    v = torch.full_like(x, tau**2)
    for r in range(rounds):
        delta = noise(x.shape, 0, r, "round")
        if isinstance(optimizer, FedAvgM):
            m = optimizer.beta * m + delta
            x = x + optimizer.lr * m
        else:
            m = optimizer.beta1 * m + (1 - optimizer.beta1) * delta
            d2 = delta**2
            if isinstance(optimizer, FedAdagrad):
                v = v + d2
            elif isinstance(optimizer, FedAdam):
                v = optimizer.beta2 * v + (1 - optimizer.beta2) * d2
            else:
                v = v - (1 - optimizer.beta2) * d2 * torch.sign(v - d2)
            x = x + optimizer.lr * m / (v.sqrt() + tau)
        found.append(x)
    return found


@pytest.mark.parametrize(
    "optimizer",
    [FedAvgM(0.7, 0.8), FedAdagrad(0.1, 0.3, 0.02), FedAdam(0.1), FedYogi(0.1)],
    ids=lambda o: type(o).__name__,
)
def test_five_rounds_follow_the_papers_equations(optimizer: Any) -> None:
    x = noise((3, 5), 0, 0, "x")
    for got, want in zip(walked(optimizer, 5, x), expected(optimizer, 5, x), strict=True):
        assert_close(got, want, rtol=0, atol=1e-12)


def test_fedavgm_without_momentum_at_rate_one_is_the_plain_mean() -> None:
    (played,) = play(FedAvg(), EQUAL)
    after, _ = step(FedAvgM(1.0, 0.0), Moments(), played.before, played.after, BOTH)
    for column, name, x in played.after.items():
        assert_close(getattr(after, column)[name], x, rtol=0, atol=1e-12)


@every_optimizer
def test_a_frozen_factor_stays_bit_for_bit_and_gathers_no_momentum(name: str) -> None:
    optimizer, moments, state = SERVER_OPTIMIZERS[name](), Moments(), None
    for played in play(RoLoRA(), EQUAL, [ALL] * 3):
        before = played.before if state is None else state
        columns = frozenset({"B" if played.round.number % 2 else "A", "other"})
        frozen = "A" if played.round.number % 2 else "B"
        held = getattr(before, frozen)
        mean = RoLoRA().aggregate(before, played.uploads, played.round)
        state, now = stepped(optimizer, moments, before, mean, columns)
        assert all(torch.equal(getattr(state, frozen)[m], held[m]) for m in MODULES)
        for m, x in getattr(moments.m, frozen).items():
            assert torch.equal(getattr(now.m, frozen)[m], x)
        moments = now


@every_optimizer
def test_what_no_one_sent_stays_bit_for_bit(name: str) -> None:
    optimizer = SERVER_OPTIMIZERS[name]()
    *_, first = play(FedAvg(), PARTIAL, [ALL])
    state, moments = step(optimizer, Moments(), first.before, first.after, BOTH)
    alone = [u for u in first.uploads if SQUARE not in u.client.layers]
    mean = FedAvg().aggregate(state, alone, Round(2, 0))
    after, now = step(optimizer, moments, state, mean, BOTH)
    assert torch.equal(after.A[SQUARE], state.A[SQUARE])
    assert torch.equal(now.m.A[SQUARE], moments.m.A[SQUARE])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_stays_and_moments_are_float32(name: str, dtype: torch.dtype) -> None:
    (played,) = play(FedAvg(), EQUAL, [ALL], dtype=dtype)
    after, moments = step(SERVER_OPTIMIZERS[name](), Moments(), played.before, played.after, BOTH)
    assert all(x.dtype == dtype for _, _, x in after.items())
    assert all(x.dtype == torch.float32 for f in (moments.m, moments.v) for _, _, x in f.items())


@every_optimizer
def test_a_step_changes_none_of_its_arguments(name: str) -> None:
    (played,) = play(FedAvg(), EQUAL)
    optimizer = SERVER_OPTIMIZERS[name]()
    _, moments = step(optimizer, Moments(), played.before, played.after, BOTH)
    held = [x for f in (played.before, played.after, moments.m, moments.v) for _, _, x in f.items()]
    copies = [x.clone() for x in held]
    step(optimizer, moments, played.before, played.after, BOTH)
    assert all(torch.equal(x, copy) for x, copy in zip(held, copies, strict=True))


@every_optimizer
def test_an_optimizers_settings_are_what_a_config_can_hold(name: str) -> None:
    for p in inspect.signature(SERVER_OPTIMIZERS[name]).parameters.values():
        assert isinstance(p.default, float)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_server_optimizer_steps_every_strategy_that_is_not_refused(name: str) -> None:
    strategy: Any = STRATEGIES[name]()
    clients = fitting(strategy)
    *_, played = play(strategy, clients, [ALL, ALL])
    trained = strategy.download(played.before, clients[0], played.round).trainable
    if why := problem(strategy):
        assert "; use fedavg" in why
        return
    state, _ = stepped(FedAvgM(), Moments(), played.before, played.after, trained)
    assert type(state) is type(played.after)
    assert strategy.effective(state).factors.adapter().keys() == MODULES.keys()


def test_moving_bases_and_refactored_models_are_refused() -> None:
    assert "keeps its model in the base" in (problem(FedEx()) or "")
    assert "refactors the model each round" in (problem(FedSVD()) or "")
    assert problem(FedAvg()) is None
    assert problem(HetLoRA()) is None


def test_factors_of_two_rounds_of_fedsvd_do_not_subtract() -> None:
    """Why it is refused: the model is where it was, and its factors are somewhere else."""
    start = make_start(EQUAL)
    turned = {m: -x for m, x in start.factors.A.items()}
    B = {m: noise(x.shape, 0, 0, m) for m, x in start.factors.B.items()}
    state = FedSVD().init(Start(Factors(start.factors.scale, turned, B), EQUAL, {}))
    again = FedSVD().aggregate(state, [], Round(1, 0))
    for m in MODULES:
        assert_close(again.adapter()[m].delta(), state.adapter()[m].delta(), rtol=0, atol=1e-11)
        assert (again.A[m] - state.A[m]).norm() > 0.5 * state.A[m].norm()


def test_a_state_without_factors_is_refused() -> None:
    with pytest.raises(StrategyError, match="has no factors to step"):
        stepped(FedAvgM(), Moments(), Round(1, 0), Round(1, 0), BOTH)
