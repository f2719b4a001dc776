"""A run of any task on a card is the run on the host, and so is one that chooses its last round.

As tests/federation/test_device_runs.py, by its `compare`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.config.reader import Config
from fedlora.launch.doctor.the_memory import fits
from fedlora.strategies.base import Client
from fedlora.training import cache, devices
from fedlora.training.footprint import _longest, footprint
from fedlora.training.optimizers import build_optimizer
from fedlora.training.train import steps, training
from tests.federation.test_device_runs import EQUAL, SHORT, compare
from tests.support.pretend_device import Card
from tests.support.task_rows import MADE, task_settings

Settings = Callable[..., dict[str, object]]


@pytest.fixture
def of(settings: Settings, tmp_path: Path) -> Settings:
    """Settings by a case of MADE."""

    def made(case: str, **changes: object) -> dict[str, object]:
        return task_settings(settings, case, tmp_path, **changes)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE)
def test_every_task(of: Settings, card: str, case: str) -> None:
    """With a base that moves, which preference's references must not see."""
    compare(of, card, case, **{"strategy.name": "fedex", "evaluate.generate-tokens": 2})


@pytest.mark.slow
def test_steps_of_several_batches_rates_by_step_and_an_end_by_validation_rows(
    of: Settings, card: str
) -> None:
    given: dict[str, object] = {
        **EQUAL, "run.rounds": 4, "clients.count": 2, "data.limit": 60, "train.batch-size": 4,
        "train.gradient-accumulation-steps": 3, "train.microbatch": 3, "train.lr-per": "step",
        "train.warmup-steps": 0.3, "train.label-smoothing": 0.1, "data.validation-size": 12,
        "stop.patience": 1, "evaluate.metrics": "mcc,balanced_accuracy,weighted_f1",
    }  # fmt: skip
    compare(of, card, "classification", **given)


@pytest.mark.slow
def test_what_a_client_of_pictures_is_said_to_need_is_what_it_takes(
    of: Settings, cards: list[Card]
) -> None:
    config = Config.read(of("pictures", **{**SHORT, "simulate.devices": "pretend:1"}))
    model = cache.model(config, cache.corpus(config).labels)
    model.load(model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 3))), 0))
    need, batch = footprint(model, config), _longest(model, config, 6)
    optimizer = build_optimizer(live := model.trainable(frozenset("AB")), config.train, 0.1)
    before = cards[1].used
    devices.forget_most(model.device)
    with training(model, config, 1, 0):
        for _ in steps(model, [batch, batch], live, optimizer, config):
            pass
    taken = devices.most_used(model.device) - before
    assert taken == pytest.approx(need.trained + need.activations(6), rel=0.25)
    (card, _) = fits(model, config, 0)
    assert "8 pictures " in card.what
    assert "tokens" not in card.what
