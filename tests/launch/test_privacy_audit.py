"""Attacks that must fail against the mechanism as it is, and succeed against it broken."""

import math

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.launch.lab.canaries import CASES, SHARP, audit, audited, lower_bound
from fedlora.launch.lab.inversion import embeddings, invert, pairs
from fedlora.privacy import accounting
from fedlora.privacy.accounting import calibrate
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.training import Payments, private_fit
from fedlora.training.data.batches import collate
from tests.support.private_setting import Build, Setting

DELTA = 1e-5


def test_the_audit_passes_the_mechanism() -> None:
    for epsilon in (1.0, 4.0):
        bound = audit(calibrate(epsilon, DELTA, 1.0, 1), DELTA, m=4000)
        assert bound <= epsilon


@pytest.mark.parametrize("name", CASES)
def test_the_audit_flags_every_planted_bug_and_nothing_else(name: str) -> None:
    """Half the noise, no clipping, noise that is used twice; and the mechanism as it is."""
    epsilon, delta, m = SHARP
    assert (audited(CASES[name], epsilon, delta, m) > epsilon) is CASES[name].broken


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_audit_flags_every_planted_bug_in_nearly_all_runs(name: str) -> None:
    epsilon, delta, m = SHARP
    flagged = sum(audited(CASES[name], epsilon, delta, m) > epsilon for _ in range(40))
    assert flagged >= 39 if CASES[name].broken else flagged <= 1


def test_the_bound_of_scores_that_say_nothing_is_zero() -> None:
    is_in = torch.arange(1000) % 2 == 0
    assert lower_bound(torch.zeros(1000), is_in, DELTA) < 0.2
    assert lower_bound(is_in.double(), is_in, 0.0) > 2.0


@pytest.mark.slow
def test_the_bound_exceeds_epsilon_in_at_most_one_run_in_twenty() -> None:
    sigma = calibrate(1.0, DELTA, 1.0, 1)
    over = 0
    for _ in range(200):
        is_in = torch.rand(2000) < 0.5
        scores = is_in + sigma * torch.randn(2000, dtype=torch.float64)
        over += lower_bound(scores, is_in, DELTA) > 1.0
    assert over <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05)


# -- gradient inversion ------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query"
STRATEGY = {"A": "fedex", "B": "ffa", "R": "fedsb"}


def recall(settings: Build, tmp_path, column: str, sigma: float) -> tuple[float, float]:
    """Of one local step on one example, what the server can read from the update."""
    given = {
        "strategy.name": STRATEGY[column], "train.steps": 1, "train.optimizer": "sgd",
        "train.lr-schedule": "constant", "train.lr": 1.0, "train.grad-clip": 0.0,
        "privacy.noise-multiplier": max(sigma, 1e-30), "privacy.clip-norm": 1.0,
        "privacy.delta": 1e-3, "privacy.sample-rate": 1.0,
    }  # fmt: skip
    s = Setting(settings("bert", **given), rank=12)
    s.model.peft.eval()
    for module in s.model.peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one = collate(s.rows, torch.tensor([0]))["input_ids"][0]
    from dataclasses import replace

    n = int(s.rows.starts[1])
    rows = replace(
        s.rows, ids=s.rows.ids[:n], starts=s.rows.starts[:2], rows=s.rows.rows[:1],
        classes=s.rows.classes[:1],
        types=None if s.rows.types is None else s.rows.types[:n],
    )  # fmt: skip
    p = s.live[column][QUERY]
    before = p.detach().clone()
    config = Config.read(s.config.flat())
    private_fit(s.model, rows, s.columns, config, 1, 0, None, Payments(Ledger(tmp_path)))
    change = p.detach() - before
    encoder = s.model.peft.base_model.model.bert.embeddings
    candidates = embeddings(encoder, 32, n + 2)
    if column != "A":
        A = s.model.read().A[QUERY]
        candidates = (x @ A.T for x in candidates)
    found = invert(change, candidates, pairs(one, 32), drop=1e-11)
    return found.recall, found.precision


@pytest.mark.parametrize("column", ["A", "B", "R"])
def test_a_sentence_can_be_read_from_one_update_unless_there_is_noise(
    settings: Build, tmp_path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    monkeypatch.setattr(accounting, "_composed", accounting._loose)
    assert recall(settings, tmp_path / "0", column, 0.0) == (1.0, 1.0)
    assert recall(settings, tmp_path / "1", column, 0.5)[0] == 0.0
