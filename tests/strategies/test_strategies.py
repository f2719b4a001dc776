"""What belongs to one strategy alone: refusals, limits, and what the base log promises."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import ClientMemoryError, StrategyError
from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Needs, Round, Upload, begins, collects, mean, narrow, rest
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.mixed import mean_ranks
from tests.support.strategy_federation import (
    EQUAL,
    MIXED,
    MODULES,
    PARTIAL,
    SEED,
    SQUARE,
    Site,
    fitting,
    make_clients,
    make_start,
    model_change,
    noise,
    numel,
    play,
    visit,
)

ALL = (0, 1, 2, 3)


def test_fedavg_refuses_unequal_ranks_and_says_what_to_use() -> None:
    (problem,) = FedAvg().problems(MIXED)
    assert "client 0 has rank 2 and client 1 rank 5" in problem
    assert "use fedex, flora or fslora" in problem
    assert not list(FedAvg().problems(EQUAL))
    assert not list(FedAvg().problems(PARTIAL))


def test_fedsb_refuses_a_rank_above_the_layer() -> None:
    (problem,) = FedSB().problems(make_clients([3, 40]))
    assert "client 1 has rank 41 on 'layers.0.k_proj' of 53 x 31" in problem


def test_fedex_refuses_a_negative_rank() -> None:
    assert list(FedEx(rank=-1).problems(EQUAL))


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_update_of_zero_leaves_the_factors_where_they_were(name: str) -> None:
    """One client that trains nothing: the model after the round is the model before."""
    strategy = STRATEGIES[name]()
    clients = fitting(strategy)
    state = strategy.init(make_start(clients))
    client, round = clients[0], Round(1, SEED)
    download = strategy.download(state, client, round)
    loaded = strategy.start(download, Factors(), client, round)
    sent, _ = strategy.upload(loaded, Factors())
    after = strategy.aggregate(state, [Upload(client, sent, 5)], round)
    before, now = (model_change(strategy.effective(x)) for x in (state, after))
    for m, change in now.items():
        assert_close(change, before.get(m, torch.zeros_like(change)), rtol=0, atol=1e-11)


def test_a_client_without_a_module_neither_gets_it_nor_dilutes_it() -> None:
    (played,) = play(FedAvg(), PARTIAL)
    m, held = "layers.0.k_proj", [0, 2, 3]
    total = sum(u.num_examples for u in played.uploads if u.client.id in held)
    A = sum(u.num_examples / total * u.sent.A[m] for u in played.uploads if u.client.id in held)
    assert_close(played.after.A[m], A, rtol=0, atol=1e-12)
    assert m not in played.uploads[1].sent.A


def test_mean_sums_half_precision_in_float32() -> None:
    """256 + 1 is 256 in bfloat16: a sum that is not widened loses every later client."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    before = Factors({"m": 1.0}, {"m": 0 * one}, {"m": 0 * one})
    uploads = [
        Upload(EQUAL[0], Factors({"m": 1.0}, {"m": x * one}, {"m": one}), 1)
        for x in [256.0] + [1.0] * 256
    ]
    assert mean(uploads, before).A["m"].item() == pytest.approx(512 / 257, rel=1e-2)
    assert mean_ranks(uploads, before, "zero").A["m"].item() == pytest.approx(512 / 257, rel=1e-2)


def test_mean_ranks_of_equal_ranks_is_the_mean_whatever_absent_says() -> None:
    (played,) = play(FedAvg(), EQUAL)
    for absent in ("unchanged", "skipped", "zero"):
        ranked = mean_ranks(played.uploads, played.before, absent)  # type: ignore[arg-type]
        for m in MODULES:
            assert_close(ranked.A[m], played.after.A[m], rtol=0, atol=1e-12)
            assert_close(ranked.B[m], played.after.B[m], rtol=0, atol=1e-12)


def test_mean_ranks_says_what_a_missing_rank_counts_as() -> None:
    x = torch.full((1, 1), 6.0)
    before = Factors({"m": 1.0}, {"m": torch.tensor([[1.0], [2.0], [3.0]])})
    uploads = [
        Upload(EQUAL[0], Factors({"m": 1.0}, {"m": x}), 1),
        Upload(EQUAL[1], Factors({"m": 1.0}, {"m": torch.tensor([[0.0], [8.0]])}), 3),
    ]

    def rows(absent: str) -> list[float]:
        ranked = mean_ranks(uploads, before, absent)  # type: ignore[arg-type]
        return ranked.A["m"].flatten().tolist()

    assert rows("unchanged") == [1.5, (2 + 3 * 8) / 4, 3.0]
    assert rows("skipped") == [1.5, 8.0, 3.0]
    assert rows("zero") == [1.5, 6.0, 3.0]


# -- narrow and rest ---------------------------------------------------------------------------


def test_narrow_and_rest_add_up_to_the_whole() -> None:
    state = make_start(MIXED).factors
    state = replace(state, B={m: noise(B.shape, 0, 0, m) for m, B in state.B.items()})
    whole, client = state.adapter(), MIXED[0]
    folds = rest(whole, client)
    for m, layer in client.layers.items():
        lead = narrow(whole[m], layer)
        assert (lead.rank, lead.scale) == (layer.rank, layer.scale)
        assert_close(lead.delta() + folds[m].delta(), whole[m].delta(), rtol=0, atol=1e-12)
    assert not rest(whole, MIXED[1]).get(SQUARE)  # the widest client lacks nothing


# -- the base log ------------------------------------------------------------------------------


def log_of(rounds: int, rank: int = 2) -> list[BaseLog]:
    logs = [BaseLog()]
    for i in range(rounds):
        delta = {
            m: Pair(noise((rank, k), i, 0, f"A{m}"), noise((d, rank), i, 0, f"B{m}"))
            for m, (d, k) in MODULES.items()
        }
        logs.append(logs[-1].add(delta))
    return logs


def test_a_base_log_sends_the_newest_change_alone_or_at_most_two_dense_ones() -> None:
    full = sum(d * k for d, k in MODULES.values())
    for log in log_of(30)[1:]:
        (newest,) = log.since(log.number - 1)
        assert not newest.snapshot
        assert all(isinstance(x, Pair) and x.rank == 2 for x in newest.delta.values())
        assert sum(numel(x) for v in log.since(0) for x in v.delta.values()) <= 2 * full
    assert any(v.snapshot for v in log.versions)


def test_a_change_larger_than_dense_is_kept_dense_and_the_log_stays_short() -> None:
    for log in log_of(5, rank=40)[1:]:
        assert all(isinstance(x, torch.Tensor) for v in log.versions for x in v.delta.values())
        assert len(log.versions) <= 2


@pytest.mark.parametrize("away_since", [0, 1, 7, 19])
def test_a_log_that_folded_still_brings_every_client_to_the_same_bits(away_since: int) -> None:
    logs = log_of(20)
    always, away = Site(), Site()
    for log in logs:
        always.take(log.since(always.base_version))
        if log.number == away_since:
            away.take(log.since(away.base_version))
    away.take(logs[-1].since(away.base_version))
    assert any(v.snapshot for v in logs[-1].versions)
    for m in MODULES:
        assert torch.equal(always.base[m], away.base[m])


def test_a_client_that_is_up_to_date_gets_no_base_change() -> None:
    sites: dict[int, Site] = {}
    *_, played = play(FLoRA(), EQUAL, [ALL, ALL], sites)
    visit(FLoRA(), played.after, EQUAL[0], sites[0], Round(3, SEED))
    again = visit(FLoRA(), played.after, EQUAL[0], sites[0], Round(3, SEED))
    assert again.sent_down["base"] == 0


# -- client memory -----------------------------------------------------------------------------


def test_fedsa_does_not_go_on_with_a_fresh_b_where_its_own_is_gone() -> None:
    client = replace(EQUAL[2], has_memory=True)
    state = FedSA().init(make_start(EQUAL))
    with pytest.raises(ClientMemoryError, match="client 2 no longer has the B that fedsa keeps"):
        FedSA().start(FedSA().download(state, client, Round(1, 0)), Factors(), client, Round(1, 0))


def test_flora_keeping_a_says_so_where_it_is_gone() -> None:
    strategy, client = FLoRA(reinit="keep-A"), replace(EQUAL[0], has_memory=True)
    download = strategy.download(strategy.init(make_start(EQUAL)), client, Round(1, SEED))
    with pytest.raises(ClientMemoryError, match="the A that flora keeps"):
        strategy.start(download, Factors(), client, Round(1, SEED))


def test_a_newcomer_to_fedsa_gets_the_head_and_b_of_zero() -> None:
    start = make_start(EQUAL)
    state = FedSA().init(start)
    download = FedSA().download(state, EQUAL[0], Round(1, SEED))
    loaded = FedSA().start(download, Factors(), EQUAL[0], Round(1, SEED))
    assert torch.equal(loaded.other["head.weight"], start.factors.other["head.weight"])
    assert all(not B.any() for B in loaded.B.values())


@dataclass(frozen=True)
class Says:
    """It needs what it has no method for."""

    what: Needs

    def needs(self) -> Needs:
        return self.what


@pytest.mark.parametrize("ask", [begins, collects])
def test_a_need_without_its_method_is_refused(ask: Any) -> None:
    assert ask(Says(Needs())) is None
    with pytest.raises(StrategyError, match=r"Says.needs\(\) says .*, and Says has no f"):
        ask(Says(Needs(first_gradient="pooled", collect_at_end=True)))
