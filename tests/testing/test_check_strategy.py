"""The contract that ships: what a strategy from elsewhere is held to, by check_strategy(cls)."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedlora.errors import StrategyError
from fedlora.strategies import STRATEGIES, register_strategy, registry
from fedlora.strategies.registry import Registry
from fedlora.testing import check_strategy, contract, run_contract
from tests.support.own_state import Padded
from tests.support.own_strategy import Mine
from tests.support.tiny_federation import ROOT


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered before the test, and nothing after it."""
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))


def test_a_strategy_from_elsewhere_keeps_the_contract_once_its_state_is_known() -> None:
    with pytest.raises(StrategyError, match=r"holds a Padded.*register_strategy") as e:
        check_strategy(Mine)
    assert e.value.__notes__ == ["Mine: a state comes back from a checkpoint bit for bit"]
    register_strategy("mine", Mine, states=(Padded,))
    check_strategy(Mine)


@dataclass(frozen=True)
class Uniform(Mine):
    """Every client counts the same, whatever its examples."""

    def aggregate(self, state: Any, uploads: Any, round: Any) -> Any:
        return Mine.aggregate(self, state, [replace(u, num_examples=1) for u in uploads], round)


@dataclass(frozen=True)
class Leaky(Mine):
    """It writes into the state that it was given."""

    def aggregate(self, state: Any, uploads: Any, round: Any) -> Any:
        after = Mine.aggregate(self, state, uploads, round)
        for m, A in after.factors.A.items():
            state.factors.A[m].copy_(A)
        return after


@dataclass(frozen=True)
class Forgetful(Mine):
    """It keeps something on the client, and does not say so."""

    def upload(self, trained: Any, kept: Any) -> Any:
        return trained, trained


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (Uniform, "a client without examples counts for nothing"),
        (Leaky, ": "),
        (Forgetful, "a client keeps something just where the strategy needs memory"),
    ],
)
def test_the_contract_sees_a_planted_bug(cls: type, check: str) -> None:
    with pytest.raises(AssertionError) as e:
        check_strategy(cls)
    assert check in e.value.__notes__[0]
    assert e.value.__notes__[0].startswith(cls.__name__)


def test_fedloras_own_pass_what_is_shipped() -> None:
    """As tests/strategies/test_contract.py holds each of them to, check by check."""
    for name in ("fedex", "fedsa"):
        check_strategy(STRATEGIES[name])
    with pytest.raises(AssertionError, match="not close"):
        check_strategy(STRATEGIES["hetlora"])
    check_strategy(STRATEGIES["hetlora"], weighs_by_examples=False)


def test_what_is_shipped_is_what_the_contract_tests_run() -> None:
    source = (ROOT / "tests" / "strategies" / "test_contract.py").read_text()
    tested = {name for name, x in vars(contract).items()
              if inspect.isfunction(x) and f"contract.{name}(" in source}  # fmt: skip
    for cls in (Mine, STRATEGIES["fedex"], STRATEGIES["fedsa"]):
        shipped = {check.__name__ for check, _, _ in run_contract.cases(cls())}
        assert shipped <= tested
        tested_only = {"a_client_whose_memory_is_gone_says_so",
                       "under_an_exact_strategy_each_client_starts_from_the_whole_model",
                       "a_refusal_says_what_to_use_instead"}  # fmt: skip
        assert tested - shipped <= tested_only
