"""Ranks that a client chooses: what leaves comes back whole, and a bad choice is refused."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedlora.errors import StrategyError, UpdateError, WireError
from fedlora.federation.wire.messages import pack_chosen, unpack_chosen
from fedlora.lora.adapter import Factors
from fedlora.strategies import registry
from fedlora.strategies.base import Needs
from fedlora.strategies.chosen import check, chooses, completed, masked, narrowed, picked
from fedlora.strategies.fedavg import FedAvg
from tests.support.strategy_federation import noise

RANKS = {"m": 4, "n": 3}
CHOSEN = {"m": torch.tensor([0, 3]), "n": torch.tensor([1])}


def factors(seed: int) -> Factors:
    A = {m: noise((r, 5), seed, 0, f"A{m}") for m, r in RANKS.items()}
    B = {m: noise((6, r), seed, 0, f"B{m}") for m, r in RANKS.items()}
    return Factors(dict.fromkeys(RANKS, 2.0), A, B, other={"head": noise((2, 2), seed, 0, "h")})


def test_what_was_picked_is_completed_to_what_was_masked() -> None:
    begun, trained = factors(0), factors(1)
    ends = masked(begun, trained, CHOSEN)
    for column in ("A", "B"):
        for m, mine in CHOSEN.items():
            old, new, got = (getattr(x, column)[m] for x in (begun, trained, ends))
            old, new, got = (x.T if column == "B" else x for x in (old, new, got))
            for j in range(RANKS[m]):
                assert torch.equal(got[j], new[j] if j in mine else old[j])
        sent = replace(ends, **{"B" if column == "A" else "A": {}})
        leaves = picked(sent, CHOSEN)
        shapes = {(c, m): tuple(x.shape) for c, m, x in sent.items()}
        told = {(c, m): tuple(x.shape) for c, m, x in leaves.items()}
        assert narrowed(shapes, CHOSEN) == told
        back = completed(leaves, CHOSEN, begun)
        for (c, m, x), (_, _, y) in zip(sent.items(), back.items(), strict=True):
            assert torch.equal(x, y), (c, m)
    assert ends.other is trained.other


def test_a_module_without_a_chosen_rank_sends_nothing_and_stays() -> None:
    begun, trained, one = factors(0), factors(1), {"m": CHOSEN["m"]}
    ends = masked(begun, trained, one)
    assert torch.equal(ends.A["n"], begun.A["n"])
    assert set(picked(ends, one).A) == {"m"}
    assert torch.equal(completed(picked(ends, one), one, begun).A["n"], begun.A["n"])


@pytest.mark.parametrize(
    "bad",
    [
        {"m": [0, 4]}, {"m": [3, 0]}, {"m": [1, 1]}, {"m": [-1, 0]}, {"x": [0, 1]}, {"m": []},
        {"m": [True, 2]}, {"m": [0, 1, 2]}, {"m": [0]},
    ],
)  # fmt: skip
def test_a_choice_of_what_is_not_there_or_of_too_many_ranks_is_refused(bad: Any) -> None:
    with pytest.raises(UpdateError, match="it chose"):
        check(bad, RANKS, 2)


def test_a_choice_travels_and_one_of_another_form_is_refused() -> None:
    came = unpack_chosen(pack_chosen(CHOSEN))
    assert {m: x.tolist() for m, x in check(came, RANKS, 3).items()} == {"m": [0, 3], "n": [1]}
    for changed in ({"counts": [2, 2]}, {"counts": [3]}, {"modules": ["m", "m"]}):
        with pytest.raises(WireError, match="do not fit"):
            unpack_chosen({**dict(pack_chosen(CHOSEN)), **changed})


@dataclass(frozen=True)
class Forgets(FedAvg):
    """It says that clients choose, and has no `choose`."""

    def needs(self) -> Needs:
        return Needs(client_choice="trained")


def test_a_strategy_whose_clients_choose_must_say_how() -> None:
    assert chooses(FedAvg()) is None
    with pytest.raises(StrategyError, match=r"Forgets has no choose\(begun, moved, "):
        registry.build(Forgets, {})
