"""A run on a card is the run on the host, tensor by tensor: every strategy and adapter form.

Bit for bit, where no kernel differs: with eager attention, and without dropout, whose masks are the
card's own. The pretend cards have the host's kernels but for a few of Llama's.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import FedLoraError, RoundError
from fedlora.strategies import STRATEGIES
from fedlora.strategies.forms import FORMS
from fedlora.training import train
from fedlora.training.model.model import Model
from tests.conftest import TEST_CARD
from tests.support.architectures import write
from tests.support.killing import kill_on_card
from tests.support.pretend_device import CAST, Card
from tests.support.tiny_federation import Ran, federate, ranks_for, read_tensors

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
TWO = "pretend:1"
SHORT: dict[str, object] = {
    "run.rounds": 2,
    "clients.count": 3,
    "train.steps": 2,
    "data.limit": 80,
    "evaluate.every": 2,
    "model.attention": "eager",
    "model.dropout": 0.0,
}
EQUAL: dict[str, object] = {"strategy.name": "fedavg", "clients.ranks": "4"}
FEW: dict[str, object] = {
    "strategy.name": "fedex", "train.steps": 1, "clients.count": 2, "clients.ranks": "2,3",
    "data.limit": 50,
}  # fmt: skip
PRIVATE = {**EQUAL, "privacy.epsilon": 8.0, "privacy.insecure-reproducible-noise": True}

OPTIONS: dict[str, dict[str, object]] = {
    "example DP": PRIVATE,
    "example DP in bfloat16": {**PRIVATE, "train.precision": "bfloat16"},
    "example DP and prefix cache": {**PRIVATE, "lora.layers": "-1", "train.prefix-cache": 10},
    "example DP on Ravan's cores": {
        **PRIVATE, "strategy.name": "ravan", "clients.ranks": "4", "lora.layers": "",
    },
    "client DP": {**PRIVATE, "privacy.level": "client"},
    "secure aggregation": {**EQUAL, "secure.aggregation": True, "secure.colluding": 0},
    "prefix cache": {"lora.layers": "-1", "train.prefix-cache": 10},
    "bfloat16 autocast": {"train.precision": "bfloat16"},
    "prefix cache in bfloat16": {
        "lora.layers": "-1", "train.prefix-cache": 10, "train.precision": "bfloat16",
    },
    "bfloat16 base, changes beside it": {"model.dtype": "bfloat16", "strategy.name": "fedex"},
    "float32 base, changes beside it": {
        "model.merge": "keep-as-adapter", "strategy.name": "fedex",
    },
    "int8 on the wire": {"wire.dtype": "int8"},
    "server optimiser": {**EQUAL, "server.optimizer": "fedadam", "server.lr": 0.01},
    "personalised and alone": {"personalize.epochs": 1.0, "personalize.alone": True},
    "baselines": {"evaluate.baselines": True},
    "mean pooling": {"model.pooling": "mean"},
    "sgd": {"train.optimizer": "sgd", "train.momentum": 0.9},
    "microbatches": {"train.microbatch": 3},
    "modules trained whole": {"lora.modules-to-save": "pooler.dense"},
    # Plans follow seconds: measured ones differ between any two runs, simulated ones do not.
    "legend": {
        "ranks.policy": "legend", "strategy.name": "fedavg",
        "devices.classes": "fast:1:100,slow:0.2:5",
    },
    "multi-krum": {**EQUAL, "robust.method": "multi-krum", "clients.count": 5},
    "buffered": {**EQUAL, "round.buffer": 2},
    "rslora": {"lora.use-rslora": True},
}  # fmt: skip
INITS = ("gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "loftq")
SIZED: dict[str, dict[str, object]] = {
    "nora": {"lora.options": "width=8"},
    "c3a": {"clients.ranks": "8"},
    "vblora": {"lora.options": "vector_length=4,num_vectors=32,topk=2"},
}
LANGUAGE: dict[str, dict[str, object]] = {
    "gpt2": {"evaluate.generate-tokens": 2},
    "gpt2, checkpointed": {"train.gradient-checkpointing": True},
    "gpt2 in bfloat16": {"train.precision": "bfloat16"},
    "gpt2, bfloat16 base": {"model.dtype": "bfloat16", "strategy.name": "fedex"},
    "gpt2, example DP": PRIVATE,
    "llama": {"evaluate.generate-tokens": 2},
    "llama, checkpointed": {"train.gradient-checkpointing": True},
    "llama, alora": {
        "lora.form": "alora", "lora.invocation": "is", "strategy.name": "ffa", "clients.ranks": "3",
        "data.prompt": "the answer to {text} is",
    },
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")
LEFT_OUT = ("lora", "alora", "shira")
"""Forms that are not in the table: alora is no classifier's and is among the language models, and
shira's tensors are sparse, which the pretend cards have not."""
APART = {"llama": 1e-3}
"""How far a tensor may be off, of its own size, where another kernel computes (RMSNorm)."""
REAL = {"float32": 2e-3, "16 bits": 1.0}
"""The same on a real card, of whose kernels each rounds otherwise."""
TURNING = ("flexlora", "raflora")
"""Whose factors keep directions of a singular value that is rounding, which turn: docs/gpu.md."""


def tensors(ran: Ran) -> dict[str, Tensor]:
    """All that a run leaves on disk: checkpoints, the clients' memory, the adapter."""
    files = [*ran.directory.glob("checkpoint/*"), *ran.directory.glob("clients/*/*/*.safetensors")]
    files += [ran.directory / "adapter" / "adapter_model.safetensors"]
    at = {f: str(f.relative_to(ran.directory)).split("/") for f in files}
    return {
        f"{parts[0]}/{'/'.join(parts[2:] or parts[1:])}/{name}": x
        for f, parts in at.items()
        for name, x in read_tensors(f)[0].items()
    }


def trained(ran: Ran) -> dict[str, Tensor]:
    """The same without the export, whose ranks and signs hang on the last bit."""
    return {name: x for name, x in tensors(ran).items() if not name.startswith("adapter/")}


def both(settings: Settings, card: str, kind: str, **changes: object) -> tuple[Ran, Ran]:
    """The same run on the host and on a card."""
    runs = []
    for n, device in enumerate(("cpu", card)):
        own = {**SHORT, **changes, "simulate.devices": device, "run.name": f"run-{n}"}
        runs.append(federate(settings(kind, **own)))
    return runs[0], runs[1]


def worst(here: dict[str, Tensor], there: dict[str, Tensor]) -> tuple[float, str]:
    """The tensor that is farthest off, relative to its own size; -1 where all bits are equal."""
    assert here.keys() == there.keys()
    gaps = {
        name: float((x.double() - there[name].double()).norm() / (x.double().norm() + 1e-30))
        for name, x in here.items()
        if not torch.equal(x, there[name])
    }
    return max(((gap, name) for name, gap in gaps.items()), default=(-1.0, ""))


def near(here: Any, there: Any, rel: float) -> bool:
    """Do two records say the same, numbers to `rel`?"""
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(near(here[k], there[k], rel) for k in here)
    if isinstance(here, list):
        return len(here) == len(there) and all(map(near, here, there, [rel] * len(here)))
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=rel, abs_tol=1e-6) or here != here
    return bool(here == there)


def unmarked(record: Any) -> Any:
    """A record without its ledgers' marks, each of a secret of its own; that there is one stays."""
    if isinstance(record, dict):
        return {k: "a mark" if k == "ledger" and x else unmarked(x) for k, x in record.items()}
    return [*map(unmarked, record)] if isinstance(record, list) else record


def compare(
    settings: Settings, card: str, kind: str = "bert", **changes: object
) -> tuple[Ran, Ran]:
    """Run on both; every tensor must have the same bits, and every figure of the record match.

    On a real card tensors are within `apart`, and the records are not compared: a test row beside
    the edge of two classes counts for either.
    """
    here, there = both(settings, card, kind, **changes)
    most = apart(card, kind, changes)
    of = tensors if most < 0 else trained
    gap, name = worst(of(here), of(there))
    print(f"{kind} {changes}: {gap:.1e} at most ({name})")
    assert gap <= most, f"{name} is off by {gap:.1e}"
    for x, y in zip(here.metrics, there.metrics, strict=True):
        x["certificate"] = y["certificate"] = x["proof"] = y["proof"] = None
        if pretend(card):
            assert near(unmarked(x), unmarked(y), 1e-2 if kind in APART else 1e-6)
    return here, there


def pretend(card: str) -> bool:
    return card.startswith("pretend:")


def apart(card: str, kind: str, changes: Mapping[str, object]) -> float:
    """How far a tensor may be off, of its own size; -1 where every bit must be the host's."""
    if pretend(card):
        return APART.get(kind, -1.0)
    if changes.get("strategy.name") in TURNING:
        return math.inf
    low = "bfloat16" in (changes.get("train.precision"), changes.get("model.dtype"))
    return REAL["16 bits" if low else "float32"]


# -- in `make test` -------------------------------------------------------------------------------


def test_a_run_on_a_card_is_the_hosts_bit_for_bit(settings: Settings, card: str) -> None:
    """Mixed ranks, a base that moves, evaluation at both ends, proof and certificate."""
    here, there = compare(settings, card, **FEW)
    for ran in (here, there):
        assert ran.rounds[-1]["proof"]["deviation"] < 2e-5
        assert ran.rounds[-1]["certificate"]["excess"] < 1


def test_a_card_of_this_machine_stands_in_for_the_pretend_one(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """By the name of the other pretend card: FEDLORA_TEST_CARD=cuda:0 pytest ... for a real one."""
    monkeypatch.setenv(TEST_CARD, "pretend:0")
    compare(settings, request.getfixturevalue("card"), **{**FEW, "run.rounds": 1})
    assert cards[0].peak
    assert not cards[1].peak


@pytest.mark.parametrize("slip", ["factor", "batch"])
def test_a_tensor_left_behind_ends_a_client(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, slip: str
) -> None:
    """What the table below would look like with a slip: an error reply that says so."""
    if slip == "batch":
        monkeypatch.setattr("fedlora.training.model.model.moved", lambda batch, _: batch)
    real = Model.load

    def load(model: Model, factors: Any, block: int = 0) -> None:
        real(model, factors, block)
        side = model.adapted[next(iter(model.held()))].lora_A[model.active]
        side.weight = torch.nn.Parameter(side.weight.detach().cpu())

    if slip == "factor":
        monkeypatch.setattr(Model, "load", load)
    given = {**SHORT, **EQUAL, "simulate.devices": TWO}
    with pytest.raises((RuntimeError, FedLoraError), match=r"device|client"):
        federate(settings(**given))


# -- the whole table ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(settings: Settings, card: str, name: str) -> None:
    compare(settings, card, **{"strategy.name": name, "clients.ranks": ranks_for(name)})


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(settings: Settings, card: str, option: str) -> None:
    CAST.clear()
    compare(settings, card, **OPTIONS[option])
    if pretend(card):
        assert bool(CAST[torch.bfloat16]) is ("bfloat16" in option and "base" not in option)


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_every_init(settings: Settings, card: str, init: str) -> None:
    compare(settings, card, **{**EQUAL, "lora.init": init})


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in FORMS if f not in LEFT_OUT])
def test_every_form(settings: Settings, card: str, form: str) -> None:
    given = {"strategy.name": "fedavg", "lora.form": form, "clients.ranks": "4"}
    if not FORMS[form].size:
        given["clients.ranks"] = "4,8,16"  # its default
    compare(settings, card, **{**given, **SIZED.get(form, {})})


@pytest.mark.slow
@pytest.mark.parametrize("case", LANGUAGE)
def test_every_language_model(settings: Settings, card: str, case: str) -> None:
    compare(settings, card, case.split()[0].rstrip(","), **LANGUAGE[case])


def mixture(name: str, root: Path) -> dict[str, object]:
    """A mixture of experts, whose experts are trained."""
    square = {"intermediate_size": 24} if name == "gpt-oss" else {}
    path = write(name, root / name, num_experts=3, num_local_experts=3, num_experts_per_tok=2,
                 **square)  # fmt: skip
    return {"model.path": str(path), "lora.target-modules": "auto", "strategy.name": "fedex",
            "lora.target-parameters": "experts.gate_up_proj,experts.down_proj",
            "train.optimizer": "sgd", "train.lr": 0.1}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_of_a_mixture(settings: Settings, card: str, tmp_path: Path, name: str) -> None:
    compare(settings, card, "llama", **mixture(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "option"), [("bert", {"strategy.name": "fedex"}), ("llama", {}), ("bert", PRIVATE)]
)
def test_without_float64_nothing_changes(
    settings: Settings, cards: Cards, kind: str, option: dict[str, object]
) -> None:
    cards[1].float64 = False
    compare(settings, TWO, kind, **option)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_needs_no_float64_on_its_card(
    settings: Settings, cards: Cards, tmp_path: Path, name: str
) -> None:
    cards[1].float64 = False
    compare(settings, TWO, "llama", **mixture(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_with_the_models_own_attention_rounding_is_all_that_differs(
    settings: Settings, card: str, kind: str
) -> None:
    here, there = both(
        settings, card, kind, **{"strategy.name": "fedex", "model.attention": "sdpa"}
    )
    gap, name = worst(trained(here), trained(there))
    assert 0 < gap < 5e-3, f"{name} is off by {gap:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("point", ["mid-client", "checkpoint-kept", "half-a-line"])
def test_a_run_killed_on_a_card_and_resumed_has_its_bits(
    settings: Settings, cards: Cards, point: str
) -> None:
    """With dropout, which the card's own generator draws."""
    given = {**SHORT, "run.rounds": 3, "model.dropout": 0.2, "strategy.name": "fedex"}
    given = settings(**given, **{"simulate.devices": TWO})
    whole = federate({**given, "run.name": "whole"})
    kill_on_card(point, 2, given)
    resumed = federate({**given, "run.resume": True})
    assert worst(tensors(whole), tensors(resumed))[0] == -1.0
    assert whole.metrics == resumed.metrics


@pytest.mark.slow
def test_dropout_on_a_card_is_its_own(settings: Settings, card: str) -> None:
    """So that a run there differs from the host's, which docs/gpu.md says."""
    here, there = both(settings, card, "bert", **{**EQUAL, "model.dropout": 0.3})
    assert worst(trained(here), trained(there))[0] > 1e-3


@pytest.mark.slow
def test_a_nodes_own_device_is_its_own(settings: Settings, cards: Cards) -> None:
    """One client on a card, the others and the server on the host: the same bits, and no word of
    it in what must match."""
    given = {**SHORT, "strategy.name": "fedex", "simulate.devices": "cpu"}
    whole = federate(settings(**given, **{"run.name": "host"}))
    seen: list[str] = []
    real = train.build_optimizer

    def build(live: Any, *args: Any) -> Any:
        seen.extend(sorted({str(p.device) for ps in live.values() for p in ps.values()}))
        return real(live, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", build)
        mixed = federate(settings(**given, **{"run.name": "mixed"}), nodes={1: {"devices": TWO}})
    assert {*seen} == {"cpu", TWO}
    assert worst(tensors(whole), tensors(mixed))[0] == -1.0


def test_a_nodes_device_that_is_not_there_is_its_own_error(settings: Settings) -> None:
    given = {**SHORT, **EQUAL, "round.min-replies": 3}
    with pytest.raises(RoundError, match=r"simulate\.devices = 'xpu'"):
        federate(settings(**given), nodes={1: {"devices": "xpu"}})
