"""Every planted bug again, in real federations, the proof switched off: the certificate alone.

Unequal numbers of examples, ranks and so alpha / r, clients that come late, a module that is not
square. Clients keep a base of their own, as machines do.
"""

from collections.abc import Callable

import pytest

import tests.strategies.test_mutants as mutants
from fedlora.errors import ProofError
from fedlora.federation.server.proof import Proof
from fedlora.strategies import STRATEGIES
from tests.federation.test_certificate import each_its_own_base, uneven
from tests.support.long import few
from tests.support.tiny_federation import federate

Settings = Callable[..., dict[str, object]]
Patch = pytest.MonkeyPatch

NAMES = {cls: name for name, cls in STRATEGIES.items()}
LIVE = {
    f"{plant.__name__}-{NAMES[type(strategy)]}": (plant, NAMES[type(strategy)], strategy)
    for plant, strategy, _ in mutants.MUTANTS
}
RAISES = ("core_scale_not_folded-fedsb",)
"""Where ranks differ, torch itself will not add what the bug makes."""
SQUARE = {"lora.target-modules": "query"}
"""Where a transposed factor raises nothing."""


ROWS = [what for what, (_, name, _) in LIVE.items() if name != "flexlora"]


def planted(settings: Settings, what: str) -> dict[str, object]:
    plant, name, strategy = LIVE[what]
    changes: dict[str, object] = {"run.rounds": 5, "clients.per-round": 3, "lora.alpha": 6.0}
    if plant in (mutants.transposed_residual, mutants.transposed_core):
        changes |= SQUARE
    if name == "florist":
        changes["strategy.florist.energy"] = strategy.energy
    if name == "lora-a2":
        changes["strategy.lora-a2.choice"] = strategy.choice
    return uneven(settings, name, **changes)


@pytest.mark.parametrize("what", few(ROWS, *ROWS[::4]))
def test_the_certificate_alone_stops_the_run(
    settings: Settings, what: str, monkeypatch: Patch
) -> None:
    each_its_own_base(monkeypatch)
    monkeypatch.setattr(Proof, "enforce", lambda *_: None)
    LIVE[what][0](monkeypatch)
    with pytest.raises((ProofError, RuntimeError)) as caught:
        federate(planted(settings, what))
    if what not in RAISES:
        assert "certificate" in str(caught.value)


@pytest.mark.parametrize("what", [w for w, (_, n, _) in LIVE.items() if n == "flexlora"])
def test_an_approximate_strategys_deviation_shows_it(
    settings: Settings, what: str, monkeypatch: Patch
) -> None:
    """FlexLoRA's first round is exact: what its clients begin with is cut only later."""

    def first() -> float:
        given = {**planted(settings, what), "run.name": str(len(seen)), "run.rounds": 1}
        deviation: float = federate(given).rounds[1]["certificate"]["deviation"]
        return deviation

    seen: list[float] = []
    seen.append(first())
    LIVE[what][0](monkeypatch)
    seen.append(first())
    assert seen[0] < 1e-5
    assert seen[1] > 0.05
