"""One base over two cards: too large for either, and the run is the host's to rounding."""

import gc
from collections.abc import Callable

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.training.model.model import Model
from fedlora.training.model.spread import device_map
from tests.federation.test_device_runs import EQUAL, PRIVATE, SHORT, trained, worst
from tests.support.pretend_device import Card
from tests.support.tiny_federation import federate

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
BOTH = {"simulate.devices": "pretend", "model.device-map": "auto"}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "moving base, mixed ranks": ("llama", {"strategy.name": "fedex"}),
    "cores": ("llama", {"strategy.name": "fedsb", "clients.ranks": "3"}),
    "proximal and penalty": ("bert", {"strategy.name": "hetlora", "train.prox": 0.1}),
    "mean pooling, a head": ("bert", {**EQUAL, "model.pooling": "mean"}),
    "example DP": ("bert", {**PRIVATE, "lora.layers": ""}),
    "checkpointed, in parts": ("llama", {
        **EQUAL, "train.gradient-checkpointing": True, "train.microbatch": 3,
    }),
    "changes beside it": ("gpt2", {"strategy.name": "fedex", "model.merge": "keep-as-adapter"}),
    "pissa": ("gpt2", {**EQUAL, "lora.init": "pissa"}),
}  # fmt: skip


def test_layers_are_spread_by_their_bytes_and_all_else_is_on_the_first(
    settings: Settings, cards: Cards
) -> None:
    model = Model(Config.read(settings("llama", **BOTH)))
    at = {n: p.device.index for n, p in model.peft.get_base_model().named_parameters()}
    layers = {n for n in at if ".layers." in n}
    assert {at[n] for n in at if n not in layers} == {0}
    assert {at[n] for n in layers} == {0, 1}
    assert all(at[n] == int(".layers.1." in n) for n in layers), "with their adapters"
    made = torch.nn.Linear(2, 2)
    with pytest.raises(Exception, match="does not say which of its modules are layers"):
        device_map(made, [c.device for c in cards])


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if n else c for n, c in enumerate(CASES)]
)
def test_a_run_on_two_cards_is_the_hosts_to_rounding(
    settings: Settings, cards: Cards, case: str
) -> None:
    kind, changes = CASES[case]
    runs = []
    for name, where in (("host", {"simulate.devices": "cpu"}), ("cards", BOTH)):
        given = settings(kind, **{**SHORT, **changes, **where, "run.name": name})
        runs.append(federate(given))
    assert cards[0].peak
    assert cards[1].peak
    gap, name = worst(trained(runs[0]), trained(runs[1]))
    assert gap < 5e-3, f"{name} is off by {gap:.1e}"
    assert not any(r["failures"] for r in runs[1].rounds[1:])


def test_it_trains_where_neither_card_has_room_for_the_base(
    settings: Settings, cards: Cards
) -> None:
    given = {**SHORT, **EQUAL, "train.microbatch": 1, "evaluate.batch-size": 1}
    whole = sum(p.nbytes for p in Model(Config.read(settings("llama"))).peft.parameters())
    one = settings("llama", **given, **{"simulate.devices": "pretend:1"})
    gc.collect()
    for card in cards:
        card.limit = card.used + int(0.9 * whole)
    with pytest.raises(ModelError, match="out of memory"):
        Model(Config.read(one))
    gc.collect()
    Model(Config.read(settings("llama", **given, **BOTH)))


@pytest.mark.slow
def test_dropout_on_the_second_card_follows_from_the_seed(settings: Settings, cards: Cards) -> None:
    given = {**SHORT, **EQUAL, **BOTH, "model.dropout": 0.3, "lora.dropout": 0.3}
    runs = []
    for name in ("one", "two"):
        for card in cards:
            card.generator.manual_seed(hash(name) % 1000)
        runs.append(federate(settings("bert", **given, **{"run.name": name})))
    assert worst(trained(runs[0]), trained(runs[1]))[0] == -1.0
