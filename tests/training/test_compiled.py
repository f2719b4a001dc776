"""Compiled layers: not after the second round, and to rounding what the plain ones compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.strategies.base import Client
from fedlora.training import cache
from fedlora.training.evaluate import evaluate
from fedlora.training.model import compiled
from fedlora.training.model.model import Model
from fedlora.training.train import fit

Settings = Callable[..., dict[str, object]]
COLUMNS = frozenset({"A", "B", "other"})


class Counter:
    """A backend that compiles nothing and counts what it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_mixed_ranks_compile_until_all_are_attached_and_never_again(
    settings: Settings, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two profiles that take turns, each attached when its first client comes."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", counter := Counter())
    config = Config.read(settings(kind, **{"train.steps": 2, "model.dropout": 0.0}))
    labels = cache.corpus(config).labels
    rows = [cache.encoded("train", i, config, labels) for i in range(2)]
    test = [cache.encoded("test", i, config, labels) for i in range(2)]
    plain = Model(config, labels)
    made = config.train.model_copy(update={"compile": True})
    model = Model(config.model_copy(update={"train": made}), labels)
    firsts = [plain.init_factors(Client(i, plain.layers(dict.fromkeys(plain.shapes, r))), 0)
              for i, r in enumerate((2, 3))]  # fmt: skip
    rounds = []
    for round in (1, 2, 3):
        before = counter.count
        for i, first in enumerate(firsts):
            found = []
            for each in (plain, model):
                each.load(first)
                fit(each, rows[i], COLUMNS, each.config, round, i)
                evaluate(each, test[i], each.config)
                found.append(each.read())
            gaps = [float((x - found[1].B[m]).abs().max()) for m, x in found[0].B.items()]
            assert max(gaps) < 1e-4
        rounds.append(counter.count - before)
    assert rounds[0] > rounds[1], "the first profile again, as the second came after it"
    assert rounds[2] == 0
