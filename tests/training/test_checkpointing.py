"""Activations that are computed again change no bit, and frozen layers below pay for nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.strategies.base import Client, Round, Start
from fedlora.training import cache
from fedlora.training.model.model import Model
from fedlora.training.train import fit
from tests.support.tiny_federation import ranks_for

Settings = Callable[..., dict[str, object]]
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "dropout": ("bert", {"model.dropout": 0.2, "lora.dropout": 0.1}),
    "mean pooling": ("bert", {"model.pooling": "mean", "lora.layers": "-1"}),
    "microbatches": ("llama", {"train.microbatch": 3}),
    "eager attention": ("llama", {"model.attention": "eager"}),
    "bfloat16": ("llama", {"train.precision": "bfloat16"}),
    "modules trained whole": ("bert", {"lora.modules-to-save": "pooler.dense"}),
    "core": ("bert", {"strategy.name": "fedsb"}),
    "blocks of a core": ("bert", {"strategy.name": "ravan"}),
    "dora": ("llama", {"lora.form": "dora", "strategy.name": "fedavg"}),
    "vera": ("bert", {"lora.form": "vera", "strategy.name": "fedavg"}),
    "alora": ("llama", {
        "lora.form": "alora", "lora.invocation": "is", "data.prompt": "{text} is",
        "strategy.name": "ffa",
    }),
}  # fmt: skip


def trained(settings: Settings, kind: str, **changes: object) -> tuple[Model, list[Tensor]]:
    """A client's model after two steps, and all that trained."""
    name = str(changes.get("strategy.name", "fedex"))
    given = {
        "strategy.name": name,
        "clients.ranks": ranks_for(name).split(",")[0],
        "train.steps": 2,
    }
    config = Config.read(settings(kind, **{"model.dropout": 0.0, **given, **changes}))
    labels = cache.corpus(config).labels
    model = Model(config, labels)
    strategy = config.build_strategy()
    rank = config.clients.ranks[0]
    client, round = Client(0, model.layers(dict.fromkeys(model.shapes, rank))), Round(1, 0)
    first = model.init_factors(client, 0)
    state = strategy.init(Start(first, [client], model.weights()))
    came = strategy.download(state, client, round)
    model.load(strategy.start(came, first, client, round), came.block)
    fit(model, cache.encoded("train", 0, config, labels), came.trainable, config, 1, 0)
    live = model.live()
    return model, [p.detach() for column in live.values() for p in column.values()]


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_has_the_bits_of_plain_training(settings: Settings, case: str) -> None:
    kind, changes = CASES[case]
    _, plain = trained(settings, kind, **changes)
    model, found = trained(settings, kind, **changes, **{"train.gradient-checkpointing": True})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.peft.modules())
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    assert any(bool(x.any()) for x in found)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_only_adapted_layers_compute_twice(settings: Settings, kind: str) -> None:
    """Two steps: the adapted layer four times, the frozen one below it twice."""
    calls: list[str] = []
    real = nn.Linear.forward

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        calls.append(names.get(module, ""))
        return real(module, x)

    names: dict[nn.Module, str] = {}
    given = {"lora.layers": "-1", "train.gradient-checkpointing": True, "evaluate.clients": False}
    model, _ = trained(settings, kind, **given)
    inner = "intermediate.dense" if kind == "bert" else "mlp.up_proj"
    ends = inner, f"{inner}.base_layer"
    found = {m: n for n, m in model.peft.named_modules() if n.endswith(ends)}
    names |= {m: n for m, n in found.items() if isinstance(m, nn.Linear)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        config = model.config
        rows = cache.encoded("train", 0, config, model.labels)
        fit(model, rows, frozenset({"A", "B"}), config, 1, 0)
    counts = [calls.count(name) for name in names.values()]
    assert counts == [2, 4]
