"""How steps are taken: of which rows, at which rates, on which labels, and how many of them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fedlora.config.policy import LimitsPolicy
from fedlora.config.reader import Config
from fedlora.errors import PolicyError, TrainingCheckError
from fedlora.federation.client.limits import Watch
from fedlora.privacy.training import PrivacyPlan
from fedlora.training import parts_check, train
from fedlora.training.data.batches import collate, local_steps
from fedlora.training.evaluate import evaluate
from fedlora.training.loss_check import check_losses
from fedlora.training.parts_check import Still, check_parts
from fedlora.training.schedule import Scheduled, factors, learning_rate
from fedlora.training.train import steps
from tests.federation.test_resume import kill_at
from tests.support.private_setting import Setting, norm
from tests.support.task_rows import task_settings
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
ROWS = [*range(11)]


def accumulating(settings: Settings, case: str, tmp_path: Path) -> Setting:
    """Steps of 3 batches of 4 rows; the 11 rows there are make parts of 4, 4 and 3."""
    more = {"train.batch-size": 4, "train.gradient-accumulation-steps": 3, "train.grad-clip": 0.0}
    return Setting(task_settings(settings, case, tmp_path, **more))


def step_of(s: Setting) -> tuple[dict[nn.Parameter, torch.Tensor], train.Step]:
    batch = collate(s.rows, torch.tensor(ROWS))
    (found,) = steps(s.model, [batch], s.live, Still(s.params), s.config)
    gradient = {p: p.grad.clone() for p in s.params if p.grad is not None}
    Still(s.params).zero_grad()
    return gradient, found


@pytest.mark.parametrize("case", ["classification", "causal-lm"])
def test_a_step_of_uneven_batches_has_the_gradient_of_all_their_rows(settings, case, tmp_path):
    """In float64 against one row at a time; rows of different token counts each count once."""
    s = accumulating(settings, case, tmp_path)
    found, step = step_of(s)
    slowly = s.one_by_one(ROWS)
    mean = {p: sum(g[p] for g in slowly) / len(ROWS) for p in found}  # type: ignore[misc]
    assert norm({p: found[p] - mean[p] for p in found}) < 1e-6 * norm(mean)
    parts = [slowly[0:4], slowly[4:8], slowly[8:11]]
    of_means = {p: sum(sum(g[p] for g in part) / len(part) for part in parts) / 3 for p in found}
    assert norm({p: found[p] - of_means[p] for p in found}) > 1e-3 * norm(mean)  # type: ignore
    assert float(step.loss) == pytest.approx(float(step.losses.double().mean()), rel=1e-6)


def test_no_more_than_a_batch_is_in_memory_at_once(settings, tmp_path, monkeypatch):
    s = accumulating(settings, "classification", tmp_path)
    sizes, real = [], train.example_losses

    def seen(model: Any, batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        return real(model, batch, *rest)

    monkeypatch.setattr(train, "example_losses", seen)
    step_of(s)
    assert sizes == [4, 4, 3]


def mean_of_means(model: Any, drawn: Any, live: Any, optimizer: Any, config: Any, *_: Any) -> Any:
    """The well-known slip: each part's mean counts the same, whatever its rows."""
    for batch in drawn:
        means, losses = [], []
        for part in train.microbatches(batch, config.train.at_once):
            losses.append(train.example_losses(model, part))
            means.append(losses[-1].mean())
        loss = torch.stack(means).mean()
        loss.backward()
        optimizer.step()
        yield train.Step(torch.cat(losses).detach(), loss.detach(), 1)


def test_the_training_check_sees_a_mean_of_means(settings, tmp_path, monkeypatch):
    s = accumulating(settings, "classification", tmp_path)
    batch = collate(s.rows, torch.tensor(ROWS[:4]))
    check_parts(s.model, batch, s.live, s.config)
    monkeypatch.setattr(parts_check, "steps", mean_of_means)
    with pytest.raises(TrainingCheckError, match="is not the mean over their rows"):
        check_parts(s.model, batch, s.live, s.config)


def test_accumulating_is_a_larger_batch_that_goes_through_in_parts(settings):
    """Bit for bit, and the clients' training check has passed it."""
    one = {"train.batch-size": 4, "train.gradient-accumulation-steps": 2, "train.steps": 2}
    other = {"train.batch-size": 8, "train.microbatch": 4, "train.steps": 2, "run.name": "other"}
    assert federate(settings(**quick("fedex", **one))).adapter == (
        federate(settings(**quick("fedex", **other))).adapter
    )


# -- the rate ---------------------------------------------------------------------------------


def scheduled(**changes: object) -> Config:
    given = {"run.rounds": 4, "train.lr": 0.1, "train.lr-per": "step"}
    return Config.read({**given, **{f"train.{k.replace('_', '-')}": v for k, v in changes.items()}})


def closed(schedule: str, total: int, warm: int) -> np.ndarray:
    """The closed form, in float64."""
    s = np.arange(total, dtype=np.float64)
    u = (s - warm) / max(total - warm, 1)
    down = {"constant": np.ones(total), "linear": 1 - u, "cosine": np.cos(np.pi * u / 2) ** 2}
    return np.where(s < warm, (s + 1) / max(warm, 1), down[schedule])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warm", "W"), [(0, 0), (5, 5), (0.25, 7), (1, 1), (28, 28), (99, 99)])
def test_the_rates_of_all_rounds_together_are_the_closed_form(schedule, warm, W):
    config = scheduled(lr_schedule=schedule, warmup_steps=warm)
    found = [x for round in (1, 2, 3, 4) for x in factors(config, round, 7)]
    np.testing.assert_allclose(found, closed(schedule, 28, W), rtol=1e-12, atol=1e-15)
    assert min(found) > 0
    tops = [learning_rate(config, round, 7) for round in (1, 2, 3, 4)]
    assert tops == [0.1 * max(found[7 * n : 7 * n + 7]) for n in range(4)]


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_after_the_warm_up_the_rates_are_those_of_transformers(schedule, theirs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    (rule,) = theirs(optimizer, 5, 28).lr_lambdas
    config = scheduled(lr_schedule=schedule, warmup_steps=5)
    found = [x for round in (1, 2, 3, 4) for x in factors(config, round, 7)]
    assert found[5:] == pytest.approx([rule(s) for s in range(5, 28)], rel=1e-12)
    assert found[:4] == pytest.approx([rule(s) for s in range(1, 5)], rel=1e-12)  # ours is not 0


def test_each_step_is_taken_at_its_own_rate_of_each_group():
    w, v = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.1}, {"params": [v], "lr": 0.4}], lr=1.0)
    around, moves = Scheduled(optimizer, [0.5, 1.0, 0.25]), []
    for _ in range(3):
        before = w.item(), v.item()
        w.grad, v.grad = torch.ones_like(w), torch.ones_like(v)
        around.step()
        moves.append((before[0] - w.item(), before[1] - v.item()))
    assert moves == [pytest.approx((0.1 * x, 0.4 * x)) for x in (0.5, 1.0, 0.25)]


@pytest.mark.parametrize("how", [{}, {"privacy.noise-multiplier": 1.0, "train.steps": 0}])
def test_a_client_steps_at_these_rates_with_and_without_dp(settings, monkeypatch, how):
    """Two rounds of 3 steps, two of them to warm up: 1/2, 1, then down from 1 by quarters."""
    rates: list[float] = []
    real = Scheduled.step

    def step(self: Scheduled) -> Any:
        found = real(self)
        rates.append(self.param_groups[0]["lr"])
        return found

    monkeypatch.setattr(Scheduled, "step", step)
    given = {"train.lr-per": "step", "train.warmup-steps": 2, "train.steps": 3, "train.lr": 0.08,
             "clients.count": 1, "round.norm-bound": 0.0, "train.max-steps": 3,
             "train.optimizer": "sgd"}  # fmt: skip
    federate(settings(**quick("fedavg", **{**given, **how, "clients.ranks": "3"})))
    assert rates == pytest.approx([0.04, 0.08, 0.08, 0.06, 0.04, 0.02])


def test_a_round_has_one_rate_unless_steps_have_their_own():
    config = Config.read({"run.rounds": 4, "train.lr": 0.1, "train.lr-schedule": "linear"})
    assert [learning_rate(config, n) for n in (1, 2, 3, 4)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025]
    )
    assert config.train.follows_rounds
    constant = {"train.lr-schedule": "constant", "train.lr-per": "step"}
    assert not Config.read({**constant, "train.warmup-steps": 5}).train.follows_rounds
    assert Config.read({**constant, "train.warmup-steps": 0.1}).train.follows_rounds


# -- how many ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, 13),  # 100 rows by 8
        ({"gradient_accumulation_steps": 4}, 4),  # by 32
        ({"max_steps": 5}, 5),
        ({"max_steps": 50}, 13),
        ({"steps": 7, "max_steps": 5}, 5),
        ({"epochs": 2.0, "gradient_accumulation_steps": 2, "max_steps": 12}, 12),
    ],
)
def test_epochs_come_to_so_many_steps_and_to_no_more_than_max_steps(changes, taken):
    base = Config.read({"train.batch-size": 8}).train
    assert local_steps(100, base.model_copy(update=changes)) == taken


def test_what_a_private_client_pays_for_is_capped_by_max_steps():
    given = {"privacy.noise-multiplier": 1.0, "privacy.sample-rate": 0.1}
    assert PrivacyPlan.of(Config.read(given), 100).steps == 10
    assert PrivacyPlan.of(Config.read({**given, "train.max-steps": 4}), 100).steps == 4


def test_a_policys_limit_counts_every_batch_of_a_step():
    watch = Watch(LimitsPolicy(steps=10), begun=math.inf, each=4)
    watch.step()
    watch.step()
    with pytest.raises(PolicyError):
        watch.step()
    assert watch.steps == 12


# -- labels -----------------------------------------------------------------------------------


def smoothed(z: np.ndarray, y: int, e: float) -> float:
    """-sum_k t_k log softmax(z)_k of t = (1 - e) [k = y] + e / c, in float64."""
    t = np.full(len(z), e / len(z))
    t[y] += 1 - e
    return float(-(t * (z - z.max() - np.log(np.exp(z - z.max()).sum()))).sum())


def slowly(case: str, z: np.ndarray, y: Any, e: float) -> float:
    if case in ("classification", "pictures"):
        return smoothed(z, int(y), e)
    shift = case == "causal-lm"
    at = [t for t in range(int(shift), len(y)) if y[t] >= 0]
    return float(np.mean([smoothed(z[t - shift], int(y[t]), e) for t in at]))


@pytest.mark.parametrize("case", ["classification", "tokens", "causal-lm", "pictures"])
def test_a_smoothed_label_costs_what_the_definition_says(settings, case, tmp_path):
    s = Setting(task_settings(settings, case, tmp_path, **{"train.label-smoothing": 0.2}))
    batch = collate(s.rows, torch.arange(6))
    with torch.no_grad():
        given = train.example_losses(s.model, batch, "float32")
        logits = s.model.logits({k: x for k, x in batch.items() if k != "labels"}).double().numpy()
        defined = s.model.task.defined(s.model, batch)
    rows = list(zip(logits, batch["labels"].numpy(), strict=True))
    want = [slowly(case, *row, 0.2) for row in rows]
    assert given.tolist() == pytest.approx(want, rel=1e-5)
    assert defined.tolist() == pytest.approx(want, rel=1e-5)
    assert want != pytest.approx([slowly(case, *row, 0.0) for row in rows], rel=1e-2)
    check_losses(s.model, batch, s.config)


def test_scores_know_nothing_of_smoothing(settings, tmp_path):
    plain = Setting(task_settings(settings, "causal-lm", tmp_path))
    plain.config = plain.config.model_copy(
        update={"train": plain.config.train.model_copy(update={"label_smoothing": 0.3})}
    )
    before = evaluate(plain.model, plain.rows, plain.config)
    plain.model.config = plain.config
    assert evaluate(plain.model, plain.rows, plain.config) == before


def test_the_training_check_sees_labels_that_are_not_smoothed(settings, tmp_path, monkeypatch):
    s = Setting(task_settings(settings, "classification", tmp_path))
    batch = collate(s.rows, torch.arange(6))
    check_losses(s.model, batch, s.config)
    kind = type(s.model.task)
    asked = s.model.config.train.model_copy(update={"label_smoothing": 0.2})
    unsmoothed = kind.losses
    plain = s.model.config

    def slip(self: Any, net: Any, batch: Any) -> Any:
        net.config = plain
        found = unsmoothed(self, net, batch)
        net.config = wanted
        return found

    wanted = s.model.config = plain.model_copy(update={"train": asked})
    check_losses(s.model, batch, wanted)
    monkeypatch.setattr(kind, "losses", slip)
    with pytest.raises(TrainingCheckError, match="not what model"):
        check_losses(s.model, batch, wanted)


# -- a killed run -----------------------------------------------------------------------------

ALL = {"train.gradient-accumulation-steps": 2, "train.batch-size": 4, "train.steps": 0,
       "train.epochs": 1.0, "train.max-steps": 2, "train.label-smoothing": 0.1,
       "train.neftune-noise-alpha": 5.0,
       "train.lr-per": "step", "train.warmup-steps": 0.3, "train.lr-schedule": "cosine",
       "run.rounds": 3}  # fmt: skip


def test_killed_and_resumed_a_run_with_all_of_it_ends_with_the_same_bits(settings):
    given = settings(**quick("fedex", **ALL))
    kill_at("mid-client", 2, given)
    resumed = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert resumed.adapter == whole.adapter
    assert resumed.metrics == whole.metrics
    assert {c["steps"] for r in whole.rounds[1:] for c in r["clients"].values()} == {2}
