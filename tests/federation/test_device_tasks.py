"""A run of any task on a card is the run on the host, and so is what a run does beside its rounds.

As tests/federation/test_device_runs.py, by its `compare`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.launch.doctor.the_memory import fits
from fedlora.launch.simulate.extend import extended
from fedlora.strategies.base import Client
from fedlora.training import cache, devices
from fedlora.training.footprint import _longest, footprint
from fedlora.training.model.model import Model
from fedlora.training.optimizers import build_optimizer
from fedlora.training.train import fit, steps, training
from tests.federation.test_device_runs import (
    EQUAL,
    PRIVATE,
    SHORT,
    compare,
    pretend,
    tensors,
    worst,
)
from tests.federation.test_start_adapter import Starts
from tests.support.pretend_device import CAST, READ, Card
from tests.support.task_rows import MADE, task_settings
from tests.support.tiny_federation import directory_of, federate

Settings = Callable[..., dict[str, object]]
TWO = "pretend:1"
FEW: dict[str, object] = {**EQUAL, "run.rounds": 1, "clients.count": 2, "data.limit": 60}
STEPS: dict[str, object] = {
    **EQUAL, "clients.count": 2, "data.limit": 60, "train.batch-size": 4,
    "train.gradient-accumulation-steps": 3, "train.microbatch": 3, "train.lr-per": "step",
    "train.warmup-steps": 0.3, "train.label-smoothing": 0.1,
}  # fmt: skip
"""Steps of several batches, rates by step, smoothed labels."""
NEWER = ("pictures", "seq2seq", "preference", "tokens")
"""Tasks that are read otherwise than a text is."""
CHECKPOINTED = {**FEW, "train.gradient-checkpointing": True}
LOW = {**FEW, "train.precision": "bfloat16"}

OPTIONS: dict[str, dict[str, object]] = {
    "classification, chosen by validation rows": {
        **STEPS, "run.rounds": 4, "data.validation-size": 12, "stop.patience": 1,
        "evaluate.metrics": "mcc,balanced_accuracy,weighted_f1",
    },
    "classification, chosen by its clients' own": {
        **FEW, "run.rounds": 2, "data.client-validation-fraction": 0.3, "stop.best": True,
    },
    "pictures, steps": {**STEPS, "evaluate.metrics": "kappa"},
    "pictures, example DP": {**PRIVATE, **FEW},
    "pictures, checkpointed": CHECKPOINTED,
    "preference, prefix cache": {**FEW, "lora.layers": "-1", "train.prefix-cache": 10},
    "pictures in bfloat16": LOW,
    "seq2seq, steps": {
        **STEPS, "evaluate.generate-tokens": 2, "evaluate.metrics": "chrf",
    },
    "seq2seq, example DP": {**PRIVATE, **FEW},
    "seq2seq, checkpointed": CHECKPOINTED,
    "bart in bfloat16": LOW,
    "preference, example DP": {**PRIVATE, **FEW},
    "causal-lm, steps": STEPS,
    "classification, DP at rates by step": {
        **PRIVATE, **FEW, "train.lr-per": "step", "train.warmup-steps": 1,
        "train.label-smoothing": 0.1,
    },
    "multi-label, metrics": {**FEW, "evaluate.metrics": "weighted_f1"},
    "regression, metrics": {**FEW, "evaluate.metrics": "r2,rmse"},
}  # fmt: skip


@pytest.fixture
def of(settings: Settings, tmp_path: Path) -> Settings:
    """Settings by a case of MADE."""
    return lambda case, **changes: task_settings(settings, case, tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE)
def test_every_task(of: Settings, card: str, case: str) -> None:
    """With a base that moves, which preference's references must not see."""
    compare(of, card, case, **{"strategy.name": "fedex", "evaluate.generate-tokens": 2})


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_task(of: Settings, card: str, option: str) -> None:
    if "chrf" in str(OPTIONS[option].get("evaluate.metrics")):
        pytest.importorskip("sacrebleu")
    CAST.clear()
    compare(of, card, option.split()[0].rstrip(","), **OPTIONS[option])
    if pretend(card):
        assert bool(CAST[torch.bfloat16]) is ("bfloat16" in option)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"model.dtype": "bfloat16"}, {"model.merge": "keep-as-adapter"}]
)
def test_a_run_that_starts_from_an_adapter(
    settings: Settings, card: str, tiny: dict[str, str], tmp_path: Path, changes: dict[str, object]
) -> None:
    start = Starts(tmp_path, tiny).made("start")
    compare(settings, card, **{**FEW, "model.adapter": str(start), **changes})


@pytest.mark.slow
def test_a_finished_run_that_goes_on(settings: Settings, card: str) -> None:
    ran = []
    for n, device in enumerate(("cpu", card)):
        here = {"simulate.devices": device, "run.name": f"run-{n}"}
        given = settings(**{**SHORT, **FEW, "train.lr-schedule": "constant", **here})
        federate(given)
        more = extended(directory_of(given), 2, "restart")
        ran.append(federate({**given, "run.resume": True, **more}))
    gap, name = worst(tensors(ran[0]), tensors(ran[1]))
    assert gap <= (-1.0 if pretend(card) else 2e-3), f"{name} is off by {gap:.1e}"
    assert len(ran[1].rounds) == 3


def loaded(given: dict[str, object]) -> tuple[Model, Config]:
    config = Config.read(given)
    model = cache.model(config, cache.corpus(config).labels)
    model.load(model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 3))), 0))
    return model, config


@pytest.mark.slow
@pytest.mark.parametrize("case", NEWER)
def test_a_step_of_no_task_waits(of: Settings, cards: list[Card], case: str) -> None:
    """Also of several batches, at a rate of its own."""
    waits = []
    for n in (2, 5):
        given = {**SHORT, **STEPS, "simulate.devices": TWO, "train.steps": n}
        if case in ("tokens", "preference"):
            del given["train.label-smoothing"]
        model, config = loaded(of(case, **given))
        rows = cache.encoded("train", 0, config, model.labels)
        READ.clear()
        fit(model, rows, frozenset({"A", "B", "other"}), config, 1, 0)
        waits.append({what: times for what, times in READ.items() if "library" not in what})
    print(case, waits)
    assert waits[0] == waits[1]
    assert waits[0].get("upload", 0) == waits[0].get("nonzero", 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", NEWER)
def test_what_a_client_is_said_to_need_is_what_it_takes(
    of: Settings, cards: list[Card], case: str
) -> None:
    """Of pictures by their patches, of an encoder-decoder in both halves, of a pair of answers."""
    model, config = loaded(of(case, **{**SHORT, "simulate.devices": TWO, "data.max-length": 24}))
    need, batch = footprint(model, config), _longest(model, config, 6)
    optimizer = build_optimizer(live := model.trainable(frozenset("AB")), config.train, 0.1)
    before = cards[1].used
    devices.forget_most(model.device)
    with training(model, config, 1, 0):
        for _ in steps(model, [batch, batch], live, optimizer, config):
            pass
    taken = devices.most_used(model.device) - before
    said = need.trained + need.activations(6)
    print(f"{case}: {taken / said:.3f} of what is said")
    assert taken == pytest.approx(said, rel=0.25)
    (card, _) = fits(model, config, 0)
    assert ("8 pictures " in card.what) == (case == "pictures")
    assert ("8 examples of 24 tokens" in card.what) == (case != "pictures")
    cards[1].limit = cards[1].used + need.trained // 2
    card, *_ = fits(model, config, 0)
    assert card.level == "problem"
    assert ("data.max-length" in card.do) == (case != "pictures")


# -- planted slips --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["seq2seq", "pictures", "multi-label", "regression", "tokens"])
def test_labels_left_behind_end_a_run(
    of: Settings, cards: list[Card], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from fedlora.training.tasks import classes, task_of

    task: Any = task_of(MADE[case][0])
    its = [type(task).losses.__globals__, vars(classes)]  # classifications share their loss
    sending = next(names for names in its if "sent" in names)
    monkeypatch.setitem(sending, "sent", lambda x, _: x)
    with pytest.raises(RuntimeError, match="pretend:1"):
        federate(of(case, **{**SHORT, **FEW, "simulate.devices": TWO}))


@pytest.mark.slow
def test_a_draw_in_a_tasks_loss_is_seen_before_round_1(
    of: Settings, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.training.tasks import seq2seq

    real = seq2seq.mean_losses

    def noisy(logits: Tensor, *rest: Any) -> Tensor:
        return real(logits + torch.rand(logits.shape, device=logits.device), *rest)

    monkeypatch.setattr(seq2seq, "mean_losses", noisy)
    with pytest.raises(TrainingCheckError, match="defines"):
        federate(of("seq2seq", **{**SHORT, **FEW, "simulate.devices": TWO}))
