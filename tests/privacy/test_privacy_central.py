"""Client-level DP: what one client can do to the mean, the noise on it, the clip that adapts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, StrategyError
from fedlora.lora.adapter import Factors
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Spend, epsilon
from fedlora.privacy.central import CentralPrivacy, check
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Layer, Round, Start, Upload
from fedlora.strategies.probing import factors, vector
from tests.privacy.test_privacy_ledger import lines, run
from tests.support.private_setting import Build

LAYERS = {"a": Layer(7, 5, 4, 0.5), "b": Layer(6, 9, 4, 0.5)}
CLIENTS = [Client(i, LAYERS) for i in range(4)]
ROUND = Round(1, 0)

FOLLOW = ("fedavg", "ffa", "fedsa", "fedsb", "rolora", "fedsvd", "ravan")
EXACT = ("fedex", "flora", "flexlora", "lora-fair", "hetlora")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RDP bound for epsilon: these tests are not about it."""
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


def begin(name: str):
    g = torch.Generator().manual_seed(0)
    A = {m: torch.randn(x.rank, x.k, generator=g) for m, x in LAYERS.items()}
    B = {m: torch.zeros(x.d, x.rank) for m, x in LAYERS.items()}
    scale = {m: x.scale for m, x in LAYERS.items()}
    weights = {m: torch.randn(x.d, x.k, generator=g) for m, x in LAYERS.items()}
    strategy = STRATEGIES[name]()
    other = {"head": torch.zeros(3)}
    return strategy, strategy.init(Start(Factors(scale, A, B, other=other), CLIENTS, weights))


def private(tmp_path: Path, name: str = "fedavg", **privacy: object) -> CentralPrivacy:
    given = {"level": "client", "noise-multiplier": 1.0, "delta": 1e-3, "clip-norm": 0.5, **privacy}
    flat = {f"privacy.{key}": value for key, value in given.items()}
    flat |= {"run.out": str(tmp_path), "clients.count": 4, "evaluate.baselines": False}
    central = CentralPrivacy.of(Config.read({**flat, "strategy.name": "fedavg"}))
    assert central is not None
    strategy, state = begin(name)
    central.open_round(strategy, state, CLIENTS, ROUND, "run", lambda _: None)
    return central


def sent(central: CentralPrivacy, i: int, size: float, seed: int = 0) -> Upload:
    """An update of this norm."""
    assert central.start is not None
    g = torch.Generator().manual_seed(100 * seed + i)
    start = vector(central.start.sent)
    change = {k: torch.randn(x.shape, generator=g) for k, x in start.items()}
    norm = math.sqrt(sum(float(x.square().sum()) for x in change.values()))
    moved = {k: start[k] + change[k] * (size / norm) for k in start}
    return replace(central.start, client=CLIENTS[i], sent=factors(moved, central.start.sent))


def mean(central: CentralPrivacy, uploads: list[Upload]) -> torch.Tensor:
    """The private mean's distance from what was before, as one vector."""
    (upload,) = central.mean(uploads, ROUND)
    assert upload.num_examples == 1
    start = vector(central.start.sent)
    return torch.cat([(x - start[k]).double().flatten() for k, x in vector(upload.sent).items()])


@pytest.mark.parametrize("name", FOLLOW)
def test_one_client_moves_the_mean_by_at_most_c_over_m(tmp_path: Path, name: str) -> None:
    central = private(tmp_path, name, **{"noise-multiplier": 1e-9})
    uploads = [sent(central, i, size) for i, size in enumerate((0.2, 0.5, 3.0, 1e6))]
    whole = mean(central, uploads)
    for i in range(4):
        move = float((whole - mean(central, uploads[:i] + uploads[i + 1 :])).norm())
        assert move <= 0.5 / 4 * (1 + 1e-3)
        assert i == 0 or move > 0.49 / 4


def test_example_counts_do_not_weigh(tmp_path: Path) -> None:
    central = private(tmp_path, **{"noise-multiplier": 1e-9})
    uploads = [sent(central, i, 0.4) for i in range(4)]
    heavy = [replace(uploads[0], num_examples=1000), *uploads[1:]]
    assert float((mean(central, uploads) - mean(central, heavy)).norm()) < 1e-6


def test_noise_has_the_std_of_the_clip_that_clipped(tmp_path: Path) -> None:
    for quantile in (0.0, 0.5):
        fast = {"clip-quantile": quantile, "clip-rate": 5.0}  # the next C is another by far
        central = private(tmp_path / str(quantile), **fast)
        C = central.C
        draws = torch.cat([mean(replace(central, C=C), []) for _ in range(200)])
        want = central.z_sum * C / 4
        assert abs(float(draws.std()) / want - 1) < 4 / math.sqrt(2 * len(draws))
    assert central.C == C  # the copies adapted, each after its own noise


def test_sum_and_count_together_cost_what_the_noise_multiplier_says(tmp_path: Path) -> None:
    central = private(tmp_path, **{"clip-quantile": 0.5})
    both = central.z_sum**-2 + (2 * central.s_b) ** -2
    assert both**-0.5 == pytest.approx(central.z)
    assert central.z_sum > central.z


def test_the_count_of_unclipped_clients_has_the_noise_that_is_paid_for(tmp_path: Path) -> None:
    central = private(tmp_path, **{"clip-quantile": 0.5})
    uploads, found = [sent(central, i, 0.2) for i in range(4)], []
    for _ in range(400):
        again = replace(central)
        mean(again, uploads)
        found.append(again.unclipped)
    half = 4 / math.sqrt(len(found))
    std = central.s_b / central.m
    assert abs(sum(found) / len(found) - 1.0) < half * std
    assert abs(float(torch.tensor(found).std()) / std - 1) < half / math.sqrt(2)


def test_a_fixed_cohort_claims_no_amplification(tmp_path: Path) -> None:
    """Nobody but the server draws it, from run.seed."""
    given = {"privacy.level": "client", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3,
             "run.out": str(tmp_path), "clients.count": 4, "clients.per-round": 2}  # fmt: skip
    for rate, q, m in ((0.0, 1.0, 2.0), (0.25, 0.25, 1.0)):
        flat = {**given, "privacy.sample-rate": rate, "run.name": str(rate)}
        flat |= {"clients.per-round": 0} if rate else {}
        central = CentralPrivacy.of(Config.read(flat))
        assert (central.q, central.m) == (q, m)
        central.pay("run", 1)
        assert [c.spend for c in central.ledger.read().charges] == [Spend(q, 1.0, 1)]


@pytest.mark.parametrize("start", [0.05, 1.0, 20.0])
def test_the_clip_norm_finds_the_median_from_either_side(tmp_path: Path, start: float) -> None:
    """Flower's has the wrong sign: from 0.1 it goes to 0.00025, from 10 to 4034."""
    given = {"clip-quantile": 0.5, "clip-norm": start, "noise-multiplier": 1e-3, "clip-rate": 0.5}
    central = private(tmp_path, **given)
    sizes = [0.7, 0.9, 1.1, 1.3]
    for n in range(40):
        mean(central, [sent(central, i, size, n) for i, size in enumerate(sizes)])
    assert 0.6 < central.C < 1.5


def test_an_update_of_zero_is_no_error(tmp_path: Path) -> None:
    central = private(tmp_path, **{"noise-multiplier": 1e-9})
    assert central.start is not None
    assert float(mean(central, [central.start]).norm()) < 1e-8


def test_no_reply_still_gives_noise_of_full_size(tmp_path: Path) -> None:
    central = private(tmp_path)
    found = torch.cat([mean(central, []) for _ in range(50)])
    assert float(found.std()) == pytest.approx(0.5 / 4, rel=0.05)


@pytest.mark.parametrize("name", FOLLOW)
def test_averages_are_covered(name: str) -> None:
    strategy, state = begin(name)
    check(strategy, state, CLIENTS, ROUND)


@pytest.mark.parametrize("name", EXACT)
def test_aggregates_that_need_each_update_are_refused(name: str) -> None:
    strategy, state = begin(name)
    with pytest.raises(StrategyError, match=r"does not aggregate through|different factors"):
        check(strategy, state, CLIENTS, ROUND)


def test_clients_of_different_rank_are_refused() -> None:
    strategy, state = begin("ffa")
    narrow = {m: replace(x, rank=2) for m, x in LAYERS.items()}
    with pytest.raises(StrategyError, match="different factors"):
        check(strategy, state, [*CLIENTS, Client(9, narrow)], ROUND)


def test_a_budget_ends_the_run(tmp_path: Path) -> None:
    budget = epsilon([Spend(1.0, 3.0, 2)], 1e-3) + 1e-6
    central = private(tmp_path, **{"noise-multiplier": 3.0})
    central.config = central.config.model_copy(
        update={"privacy": central.config.privacy.model_copy(update={"epsilon": budget})}
    )
    central.pay("run", 2)
    with pytest.raises(BudgetSpent, match="budget is spent"):
        central.pay("run", 3)


def test_the_servers_own_spent_budget_ends_the_run_in_good_order(settings: Build, tmp_path) -> None:
    given = {
        "strategy.name": "fedsb", "clients.ranks": "3", "run.rounds": 1,
        "privacy.level": "client", "privacy.epsilon": 2.0, "privacy.delta": 1e-3,
        "privacy.ledger": str(tmp_path / "shared"),
    }  # fmt: skip
    run(settings("bert", **given))
    server = run(settings("bert", **given, **{"run.name": "again"}))
    summary = json.loads((server.setting.journal.directory / "summary.json").read_text())
    assert summary["stopped"].startswith("before round 1: the privacy budget is spent")
    assert [line["round"] for line in lines(server)] == [0]


def test_poisson_cohorts_are_by_chance_of_the_system(tmp_path: Path) -> None:
    central = private(tmp_path, **{"sample-rate": 0.5})
    assert central.m == 2.0
    assert central.q == 0.5
    cohorts = [tuple(central.cohort(range(4), ROUND)) for _ in range(400)]
    assert len(set(cohorts)) == 16
    assert sum(map(len, cohorts)) == pytest.approx(800, abs=4 * math.sqrt(400))


def test_a_federation_runs_and_says_what_it_spent(settings: Build) -> None:
    given = {
        "strategy.name": "fedsb", "clients.ranks": "3", "run.rounds": 2,
        "privacy.level": "client", "privacy.noise-multiplier": 2.0, "privacy.delta": 1e-3,
        "privacy.clip-quantile": 0.5, "privacy.sample-rate": 0.3,
    }  # fmt: skip
    server = run(settings("bert", **given))
    last = lines(server)[-1]
    assert last["privacy"]["epsilon"] == pytest.approx(epsilon([Spend(0.3, 2.0, 2)], 1e-3))
    assert server.session.central.C == last["privacy"]["next_clip"] != 0.3
    for facts in last["clients"].values():
        assert facts["train_loss"] is None
        assert facts["examples"] == 1


def test_the_noise_is_told_before_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    central = private(tmp_path)
    central.start = None
    central.open_round(*begin("fedavg"), CLIENTS, ROUND, "run", said.append)
    numbers = sum(x.numel() for x in vector(central.start.sent).values())
    assert central.noise_to_signal(numbers) == pytest.approx(math.sqrt(numbers) / 4)
    assert "times the longest" in said[0]
