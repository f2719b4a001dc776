"""Whole federations: every strategy on every kind of model, and what a run promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_federation import Ran, federate, quick, read_tensors, timeless

from fedlora.strategies import STRATEGIES

Settings = Callable[..., dict[str, object]]
MODELS = ("bert", "gpt2", "llama")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_on_every_kind_of_model(
    settings: Settings, name: str, kind: str
) -> None:
    changes = {"output.keep-updates": True, "clients.count": 5, "clients.per-round": 3}
    ran = federate(settings(kind, **quick(name, **changes, **{"run.rounds": 3})))
    rounds = ran.rounds
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    assert not any(r["failures"] for r in rounds)
    assert all(len(r["accepted"]) == 3 for r in rounds[1:])
    for r in rounds[1:]:
        assert r["bytes"]["up"] == sum(c["bytes_up"] for c in r["clients"].values()) > 0
        assert r["bytes"]["down"] == sum(c["bytes_down"] for c in r["clients"].values()) > 0
    if STRATEGIES[name]().promise == "exact":
        want = replayed(ran, name)
        got = exported(ran)
        for m, delta in want.items():
            gap = np.linalg.norm(got.get(m, 0.0) - delta) / np.linalg.norm(delta)
            assert gap < 1e-4, (m, gap)
