"""losia and smt with choice = "gradient": the clients' first gradients choose where they train."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, ModelError, StrategyError
from fedlora.federation.client import first_gradient
from fedlora.federation.server import chosen_places, loop
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.compare.experiment import Experiment, cells
from fedlora.launch.compare.row import row as compare_row
from fedlora.launch.compare.run import run as run_cells
from fedlora.launch.doctor.the_plan import by_gradient
from fedlora.launch.doctor.the_run import experiment
from fedlora.launch.experiment_file import of_run
from fedlora.launch.node_cli import refusals
from fedlora.launch.simulate.cards import grid_of
from fedlora.launch.simulate.run import resumed
from fedlora.reports.changed import changed, sections
from fedlora.reports.run_files import read
from fedlora.strategies import STRATEGIES
from fedlora.strategies.forms import FORMS as FORMS_THERE_ARE
from fedlora.strategies.forms import problem
from fedlora.training import cache
from fedlora.training.model.model import Model
from tests.federation.test_first_gradient import gradients
from tests.support.exported import check_exports
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, quick
from tests.support.under_policy import named as under
from tests.support.under_policy import written

Settings = Callable[..., dict[str, object]]
FORMS: dict[str, dict[str, object]] = {
    "losia": {"lora.form": "losia", "lora.options": "choice=gradient", "clients.ranks": "5"},
    "smt": {"lora.form": "smt", "lora.options": "block=4,choice=gradient", "clients.ranks": "3"},
}


def given(settings: Settings, form: str, **more: object) -> dict[str, object]:
    return settings(**quick("fedavg", **{**FORMS[form], **more}))


def of(ran: Ran) -> Config:
    return of_run(ran.directory / "config.toml")


def slow_losia(W: Any, G: Any, r: int) -> list[int]:
    importance = abs(W * G - 0.5 * (W * G) ** 2)

    def top(x: Any) -> list[int]:
        return sorted(np.argsort(-x, kind="stable")[:r].tolist())

    rows, columns = top(importance.sum(1)), top(importance.sum(0))
    ways = [
        (rows, top(importance[rows].sum(0))),
        (top(importance[:, columns].sum(1)), columns),
    ]
    held = [importance[np.ix_(*x)].sum() for x in ways]
    found = ways[int(held[1] > held[0])]
    return [*found[0], *found[1]]


def slow_smt(W: Any, G: Any, r: int) -> list[int]:
    (d, k), b, means = G.shape, 4, {}
    for i in range(d // b):
        for j in range(k // b):
            means[i * (k // b) + j] = abs(G[i * b : i * b + b, j * b : j * b + b]).mean()
    return sorted(sorted(means, key=lambda n: -means[n])[:r])


SLOW = {"losia": slow_losia, "smt": slow_smt}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_trains_where_the_clients_gradients_say(form: str, settings: Settings) -> None:
    """Against autograd's gradients, one example at a time, and the definition in NumPy."""
    seen: list[FederatedLora] = []
    ran = federate(given(settings, form), before=seen.append)
    config = of(ran)
    plain = given(settings, form, **{"lora.form": "lora", "lora.options": ""})
    G, n = gradients(plain)
    model = cache.model(config, cache.corpus(config).labels)
    places = dict(x.split("=") for x in config.lora.places)
    assert {*places} == {*model.shapes}
    by_weight, moved = Model(Config.read(given(settings, form)), model.labels), 0
    for m, W in model.weights().items():
        mean = sum(x / sum(n) * g[m] for x, g in zip(n, G, strict=True)).numpy()
        want = SLOW[form](W.double().numpy(), mean, model.rank)
        assert [int(x) for x in places[m].split()] == want
        one, other = (x.adapted[m].form_frozen["rows"] for x in (model, by_weight))
        moved += one.tolist() != other.tolist()
    assert moved, "else it is not seen that the gradient chose"
    assert ran.rounds[-1]["proof"]["deviation"] < 1e-6
    run = read(ran.directory)
    assert "lora.places" not in changed(run)
    (shown,) = [x for key, x, _ in sections(run, {})["lora"] if key == "places"]
    assert re.fullmatch(r".{200}\.\.\. and \d+ characters more, in config\.toml", shown)
    (server,) = seen
    check_exports(server, ran.directory)


@pytest.mark.parametrize("form", few(FORMS, "smt"))
@pytest.mark.parametrize("name", [*STRATEGIES])
def test_every_strategy_that_goes_with_a_linear_form_chooses_by_gradient_too(
    name: str, form: str, settings: Settings
) -> None:
    config = settings(**{**quick(name), **FORMS[form]})
    if problem(FORMS_THERE_ARE[form], STRATEGIES[name]()):
        with pytest.raises(FedLoraError, match="fedsa"):
            federate(config)
        return
    ran = federate(config)
    assert of(ran).lora.places
    assert ran.rounds[-1]["proof"]["deviation"] < 1e-6
    assert ran.rounds[-1]["proof"]["norm"] > 0


def test_the_gradients_bytes_are_on_the_account(settings: Settings) -> None:
    ran = federate(given(settings, "losia", **{"evaluate.every": 1}))
    config = of(ran)
    shapes = cache.model(config, cache.corpus(config).labels).shapes.values()
    numbers = 4 * 3 * sum(s.d * s.k for s in shapes)  # of three clients
    beforehand = ran.rounds[0]["bytes"]
    assert numbers < beforehand["up"] < 1.2 * numbers + 6000
    assert beforehand["down"] > 0
    for way in ("up", "down"):
        assert ran.summary["bytes"][way] == sum(r["bytes"][way] for r in ran.rounds)
    row = compare_row("", "fedavg", "exact", [ran.directory])
    assert row.numbers["once"] >= sum(beforehand.values())
    assert row.numbers["up"] == ran.summary["bytes"]["up"]


@pytest.mark.parametrize("how", ["--resume", "the user's own config"])
def test_a_resumed_run_asks_nobody_again_and_has_the_same_bits(
    how: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federate(given(settings, "losia", **{"run.name": "whole"}))
    begun = given(settings, "losia", **{"run.name": "cut"})
    config = preflight.read(begun)
    with grid_of(config, client_app, None) as grid:
        server = FederatedLora(config)
        server.begin(grid)
        server.round(grid, 1)
    monkeypatch.setattr(chosen_places, "pooled_gradient", None)  # who asks again fails
    if how == "--resume":
        path, changes = resumed(Path(str(begun["run.out"]), "cut"))
        again = of_run(path, changes).flat()
    else:
        again = {**begun, "run.resume": True}
        findings, _ = experiment(Config.read(again))
        assert not [f for f in findings if f.level == "problem"]
    ran = federate(again)
    assert ran.adapter == whole.adapter
    assert of(ran).lora.places == of(whole).lora.places


@pytest.mark.parametrize(
    "change", [{}, {"run.seed": 9}, {"clients.ranks": "4"}, FORMS["smt"]], ids=lambda x: str([*x])
)
def test_a_run_that_ended_before_round_0_asks_again(
    change: dict[str, object], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had chosen was of settings that may have been mended since."""
    begun = given(settings, "losia")
    with monkeypatch.context() as m:
        m.setattr(loop, "round_zero", _ended)
        with pytest.raises(KeyboardInterrupt):
            federate(begun)
    first = of_run(Path(str(begun["run.out"]), "run", "config.toml")).lora.places
    asked: list[object] = []
    real = chosen_places.pooled_gradient
    monkeypatch.setattr(chosen_places, "pooled_gradient", lambda *x: (asked.append(x), real(*x))[1])
    ran = federate({**begun, **change, "run.resume": True})
    assert len(asked) == 1
    assert len(ran.rounds) == 3
    assert (of(ran).lora.places == first) == (not change)


def _ended(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_fresh_run_of_an_old_runs_config_asks_anew(settings: Settings) -> None:
    old = federate(given(settings, "losia"))
    more = {"run.name": "again", "run.seed": 9, "run.resume": False}
    again = federate({**of_run(old.directory / "config.toml").flat(), **more})
    alone = federate(given(settings, "losia", **{"run.name": "alone", "run.seed": 9}))
    assert of(again).lora.places == of(alone).lora.places != of(old).lora.places
    assert again.adapter == alone.adapter


def test_the_server_holds_one_model_while_places_are_chosen(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    real = Model.__init__

    def counted(self: Model, *args: Any) -> None:
        made.append(args)
        real(self, *args)

    cache.forget_model()
    monkeypatch.setattr(Model, "__init__", counted)
    ran = federate(given(settings, "losia"))
    assert len(made) == 1, "it is the clients' too, in this process"
    other = Model(of(ran), cache.corpus(of(ran)).labels)  # as a client makes it
    assert other.fingerprint == cache.model(of(ran), other.labels).fingerprint


@pytest.mark.parametrize("pooling", ["mean", "default"])
def test_a_module_that_no_gradient_reaches_is_said_before_anything_trains(
    pooling: str, settings: Settings
) -> None:
    """By pooling = "mean" nothing hangs on the pooler."""
    modules = "query,value,pooler.dense"
    config = given(settings, "losia", **{"model.pooling": pooling, "lora.target-modules": modules})
    if pooling == "default":
        assert len(of(federate(config)).lora.places) == 5
    else:
        with pytest.raises(FedLoraError, match=r"pooler\.dense"):
            federate(config)


def test_out_of_memory_the_first_gradient_is_taken_again_with_half(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = first_gradient.example_losses, list[int]()

    def small(model: Model, batch: Any) -> Any:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch)

    whole = federate(given(settings, "losia", **{"run.name": "whole"}))
    monkeypatch.setattr(first_gradient, "example_losses", small)
    ran = federate(given(settings, "losia"))
    assert max(sizes) > 4
    assert of(ran).lora.places == of(whole).lora.places


def test_nodes_under_a_policy_are_asked_for_their_consent(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    own = {"data.path": "", "data.test-path": tiny["rows"], "data.dedupe": False}
    ends = []
    for name, kinds in (("no", []), ("yes", ["gradient"])):
        limits = {"kinds": ["query", "train", "evaluate", *kinds]}
        policies = [
            written(tmp_path / f"{name}-{i}", tiny["bert"], tiny["rows"], limits=limits)
            for i in range(3)
        ]
        config = given(settings, "losia", **own, **{"run.name": name})
        said = refusals(Policy.load(policies[0]), Config.read(config))
        assert any("kind gradient" in x for x in said) == (name == "no")
        nodes = {i: under(p) for i, p in enumerate(policies)}
        if name == "no":
            with pytest.raises(FedLoraError, match=r"no client sent its first gradient.*kind"):
                federate(config, nodes=nodes)
        else:
            ends.append(federate(config, nodes=nodes))
    assert of(ends[0]).lora.places


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ("0 1 2 3 4 0 1 2 3", "must be 5 of 0 to"),
        ("0 1 2 3 4 0 1 2 3 99999", "must be 5 of 0 to"),
        ("0 1 2 3 3 0 1 2 3 4", "each once and in ascending order"),
        ("4 1 2 3 0 0 1 2 3 4", "each once and in ascending order"),
        ("0 1 2 3 -4 0 1 2 3 4", "must be a whole number"),
        ("0 1 2 3 \u0664 0 1 2 3 4", "must be a whole number"),
        ("0 1 2 3 99999999999999999999 0 1 2 3 4", "must be a whole number"),
        ("", "must be 5 of 0 to"),
    ],
)
def test_places_that_no_layer_has_are_refused(
    places: str, problem: str, settings: Settings
) -> None:
    """As a hostile server might send them, for one of the modules."""
    config = Config.read(given(settings, "losia"))
    first, *others = cache.model(config, cache.corpus(config).labels).shapes
    fine = "0 1 2 3 4 0 1 2 3 4"
    lora = {"lora.places": ",".join([f"{first}={places}", *(f"{m}={fine}" for m in others)])}
    with pytest.raises(ModelError, match=problem):
        Model(Config.read({**config.flat(), **lora}), ("x", "y"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"privacy.level": "client", "privacy.noise-multiplier": 1.0}, "without noise"),
        ({"secure.aggregation": True}, "in the clear"),
        ({"lora.options": "", "lora.places": "a=1"}, "lora.places: written by a run"),
        ({"lora.options": "choice=gradients"}, "must be weight or gradient"),
        ({"lora.form": "paca"}, "paca has no 'choice'"),
        ({"lora.form": "lora"}, "keys of its own"),
        ({"lora.form": "oft"}, "oft has no 'choice'"),
    ],
)
def test_doctor_refuses_what_the_run_refuses(
    change: dict[str, object], problem: str, settings: Settings
) -> None:
    changed_ = given(settings, "losia", **change)
    for refuse in (federate, lambda x: experiment(preflight.read(x))):
        with pytest.raises(FedLoraError, match=problem):
            refuse(changed_)


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({}, "ok", r"losia trains where the gradient says: each client sends .* MB, before"),
        ({"lora.options": ""}, "note", r"losia trains where W0 is largest; its authors go by the"),
        ({"lora.options": "choice=weight"}, "note", r"losia trains where W0 is largest"),
        ({"lora.options": "", "privacy.level": "client", "privacy.noise-multiplier": 1.0}, "", ""),
        ({"lora.form": "paca", "lora.options": ""}, "", ""),
        ({"lora.form": "lora", "lora.options": ""}, "", ""),
    ],
)
def test_doctor_says_by_what_a_form_chooses_and_what_that_costs(
    change: dict[str, object], level: str, said: str, settings: Settings
) -> None:
    found = [*by_gradient(Config.read(given(settings, "losia", **change)), 12_345_678)]
    assert [f.level for f in found] == ([level] if level else [])
    if found:
        assert re.search(said, found[0].what)
        assert "12.3 MB" in found[0].what + found[0].do
    findings, _ = experiment(Config.read(given(settings, "losia")))
    assert any(re.search("trains where the gradient says", f.what) for f in findings)


def test_where_no_gradient_arrives_nothing_is_begun(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chosen_places.pooled_gradient
    monkeypatch.setattr(
        chosen_places, "pooled_gradient", lambda *x: ({m: 0 * g for m, g in real(*x)[0].items()}, 3)
    )
    with pytest.raises(StrategyError, match="zero in every adapted module"):
        federate(given(settings, "losia"))


def test_a_resumed_run_keeps_the_places_of_its_checkpoint(settings: Settings) -> None:
    """Whatever its config has: they are written by a run, and set by nobody."""
    begun = given(settings, "losia", **{"run.rounds": 3, "train.lr-schedule": "constant"})
    whole = federate({**begun, "run.name": "whole"})
    ran = federate({**begun, "run.rounds": 2})
    first, *others = of(ran).lora.places
    module, _, places = first.partition("=")
    moved = f"{module}={' '.join(places.split()[5:] + places.split()[:5])}"
    federate({**begun, "run.resume": True, "lora.places": ",".join([moved, *others])})
    assert of(ran).lora.places == of(whole).lora.places
    assert ran.adapter == whole.adapter


def test_a_comparison_given_again_keeps_its_cells(settings: Settings, tmp_path: Path) -> None:
    path, config = tmp_path / "again.toml", given(settings, "losia")
    path.write_text(tomli_w.dumps({k: v for k, v in config.items() if not k.startswith("run.o")}))
    found, said = Experiment.load(str(path)), list[str]()
    for _ in range(2):
        grid = cells(found, ["fedavg"], [0], {}, tmp_path / "out", False)
        run_cells(found, grid, 1, said.append)
    assert said[-1] == "1 of 1 cells are done already"
