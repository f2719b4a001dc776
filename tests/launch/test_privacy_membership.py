"""Membership attacks tell a model that leaks, and say nothing of one that does not."""

import math

import pytest
import torch
from torch import Tensor

from fedlora.launch.lab.membership import alignment, confidence, half_width, lira, telling
from fedlora.training.data.batches import collate
from fedlora.training.train import example_losses
from tests.support.private_setting import Build, Setting

MODELS, ROWS = 8, 600


def scores(effect: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidences of models whose rows differ in difficulty; `effect` is what membership adds."""
    g = torch.Generator().manual_seed(seed)
    is_in = torch.zeros(MODELS, ROWS, dtype=torch.bool)
    for k in range(MODELS):
        is_in[k, torch.randperm(ROWS, generator=g)[: ROWS // 2]] = True
    difficulty = 3 * torch.randn(ROWS, generator=g)
    noise = torch.randn(MODELS, ROWS, generator=g)
    return difficulty + noise + effect * is_in, is_in


def auc(found: Tensor, is_in: Tensor) -> tuple[float, float]:
    known = found.isfinite()
    mine, others = found[known & is_in], found[known & ~is_in]
    value = telling(mine, others)[0]
    return value, half_width(value, len(mine), len(others))


@pytest.mark.parametrize("offline", [False, True])
def test_lira_tells_a_model_that_leaks_better_than_its_losses_do(offline: bool) -> None:
    phi, is_in = scores(effect=1.5)
    found, width = auc(lira(phi, is_in, 0, offline), is_in[0])
    by_loss, _ = auc(phi[0], is_in[0])
    assert found - width > by_loss
    assert by_loss > 0.5
    assert found > 0.75


@pytest.mark.parametrize("offline", [False, True])
def test_lira_says_nothing_of_models_that_do_not_leak(offline: bool) -> None:
    phi, is_in = scores(effect=0.0)
    for attack in (lira(phi, is_in, 0, offline), phi[0]):
        found, width = auc(attack, is_in[0])
        assert abs(found - 0.5) < 1.5 * width


def test_a_row_that_no_shadow_had_has_no_score_rather_than_a_wrong_one() -> None:
    phi, is_in = scores(effect=1.0)
    is_in[1:, 0], is_in[1:, 1] = False, True
    online, offline = lira(phi, is_in, 0), lira(phi, is_in, 0, offline=True)
    assert online[:2].isnan().all()
    assert offline[0].isfinite()
    assert offline[1].isnan()
    both = is_in[1:].any(0) & ~is_in[1:].all(0)
    assert online.isfinite().equal(both)
    assert both.sum() > ROWS / 2


def test_confidence_is_the_log_odds_of_the_loss_and_finite_at_its_limits() -> None:
    p = torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(confidence(-p.log()), (p / (1 - p)).log())
    assert confidence(torch.tensor([0.0, 200.0])).isfinite().all()


def test_scores_that_are_all_alike_tell_nothing() -> None:
    assert telling(torch.zeros(40), torch.zeros(30))[0] == 0.5
    assert telling(torch.ones(50), torch.zeros(50)) == (1.0, 1.0)


def test_the_interval_of_an_auc_holds_it_as_often_as_it_says() -> None:
    g = torch.Generator().manual_seed(0)
    inside, truth = 0, 0.5 * (1 + math.erf(1 / 2))  # of normal scores one deviation apart
    for _ in range(300):
        mine, others = 1 + torch.randn(40, generator=g), torch.randn(60, generator=g)
        found, _ = telling(mine, others)
        inside += abs(found - truth) <= half_width(found, 40, 60)
    assert 0.91 <= inside / 300 <= 0.985


def test_an_update_aligns_with_the_gradients_it_was_made_of(settings: Build) -> None:
    """By the slow definition, and higher for the rows that were in it than for the others."""
    s = Setting(settings("bert", **{"strategy.name": "fedavg"}), dtype=torch.float32)
    s.model.peft.eval()
    numbers = list(range(16))
    single = s.one_by_one(numbers)
    change = {
        c: {m: -sum(g[p] for g in single[:8]).double() for m, p in ps.items()}
        for c, ps in s.live.items()
    }
    went = torch.cat([-change[c][m].flatten() for c, ps in s.live.items() for m in ps])
    slow = []
    for g in single:
        flat = torch.cat([g[p].flatten() for ps in s.live.values() for p in ps.values()]).double()
        slow.append(flat @ went / (flat.norm() * went.norm()))
    rows = _first(s, 16)
    found = alignment(s.model, rows, change, size=5)
    torch.testing.assert_close(found, torch.stack(slow), rtol=1e-3, atol=1e-5)
    assert telling(found[:8], found[8:])[0] > 0.7
    assert example_losses(s.model, collate(rows, torch.arange(2))).isfinite().all()


def _first(s: Setting, n: int):  # type: ignore[no-untyped-def]
    return s.rows.select(torch.arange(n))
