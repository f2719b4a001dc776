"""A user's own model, tokenizer, data, loss, metrics and strategy, by name and as objects."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FedLoraError,
    ModelError,
    StrategyError,
)
from fedlora.federation.client.job import ClientJob
from fedlora.launch.client_app import client_app, make_client_app
from fedlora.launch.export import export_run
from fedlora.launch.federation import Federation, with_own
from fedlora.launch.simulate.grid import LocalGrid, run_local
from fedlora.strategies import STRATEGIES, register_strategy, registry
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.registry import Registry
from fedlora.training import cache
from fedlora.training.evaluate import evaluate
from fedlora.training.train import example_losses
from fedlora.training.user_code import find, identity, name_of, named, sources
from tests.support import own_code
from tests.support.own_state import Padded
from tests.support.own_strategy import Mine
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]
HERE = "tests.support.own_code"
BAG = {
    "model.path": f"py:{HERE}:make_model",
    "model.tokenizer": f"py:{HERE}:make_tokenizer",
    "lora.target-modules": "inner,outer",
}
ALL = {
    **BAG,
    "data.path": f"py:{HERE}:rows",
    "train.loss": f"py:{HERE}:smoothed",
    "evaluate.metrics": f"py:{HERE}:top_two",
}


def played(config: Config) -> Ran:
    """A run of a federation whose clients may run what the config names."""
    app = client_app(value for _, value in named(config))
    flat, workers = config.flat(), config.simulate.workers
    with LocalGrid(app, config.clients.count, flat, workers) as grid:
        Federation(config).start(grid)
    return Ran(Path(config.run.out, config.run.name))


# -- what a run of it is --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_tokenizer_data_loss_and_metrics_of_ones_own_run_export_and_score(
    settings: Settings, tmp_path: Path, workers: int
) -> None:
    given = settings(**quick("fedex", **ALL), **{"simulate.workers": workers})
    given |= {"evaluate.every": 1, "evaluate.clients": True, "train.steps": 4}
    config = Config.read(given)
    ran = played(config)
    last, first = ran.rounds[-1]["evaluation"], ran.rounds[0]["evaluation"]
    assert last["examples"] == 60
    assert first["loss"] > last["loss"]
    assert 0 < last["top_two"] <= 1
    assert ran.rounds[-1]["clients"]["0"]["after"]["top_two"] > 0
    assert ran.summary["model"] == BAG["model.path"]
    assert ran.rounds[-1]["proof"]["deviation"] < 1e-6
    for merged in (False, True):
        found = export_run(ran.directory, tmp_path / f"export-{merged}", merged)
        assert found.deviation < 1e-5


def test_one_and_two_workers_give_the_same_adapter(settings: Settings) -> None:
    ran = [
        played(Config.read(settings(**quick("fedsa", **ALL), **{
            "simulate.workers": n, "run.name": f"with-{n}"})))
        for n in (1, 2)
    ]  # fmt: skip
    assert ran[0].adapter == ran[1].adapter


def test_the_loss_that_is_trained_and_scored_is_ones_own(settings: Settings) -> None:
    config = Config.read(settings(**quick("fedavg", **ALL)))
    corpus = cache.corpus(config)
    model = cache.model(config, corpus.labels)
    rows = cache.encoded("central", -1, config, corpus.labels)
    model.load(model.read())
    scores = evaluate(model, rows, config)
    assert scores is not None
    plain = evaluate(model, rows, config.model_copy(
        update={"train": config.train.model_copy(update={"loss": ""})}))  # fmt: skip
    assert plain is not None
    assert scores["accuracy"] == plain["accuracy"]
    assert not math.isclose(scores["loss"], plain["loss"], rel_tol=1e-4)
    from fedlora.training.data.batches import eval_batches

    batch = next(eval_batches(rows, 60))
    logits = model.logits({k: x for k, x in batch.items() if k != "labels"})
    want = own_code.smoothed(logits, batch["labels"])
    torch.testing.assert_close(example_losses(model, batch), want)
    assert math.isclose(scores["loss"], want.mean().item(), rel_tol=1e-5)


def test_its_own_loss_trains_with_privacy_too(settings: Settings) -> None:
    given = settings(**quick("fedavg", **ALL), **{"privacy.noise-multiplier": 1.0})
    given |= {"lora.layers": "", "train.lr": 0.1}
    ran = played(Config.read(given))
    assert ran.rounds[-1]["clients"]["0"]["privacy"]["epsilon"] > 0


def test_a_language_models_own_loss_and_metrics(settings: Settings) -> None:
    given = settings("gpt2", **quick("fedavg"))
    given |= {"train.loss": f"py:{__name__}:first_token", "evaluate.every": 1}
    given |= {"evaluate.metrics": f"py:{__name__}:shortest", "evaluate.generate-tokens": 2}
    ran = played(Config.read(given))
    assert ran.rounds[-1]["evaluation"]["shortest"] >= 0


def first_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each example, the loss of its first scored token."""
    at = (labels[:, 1:] != -100).int().argmax(1)
    rows = torch.arange(len(labels))
    want = labels[rows, at + 1]
    return torch.nn.functional.cross_entropy(logits[rows, at], want, reduction="none")


def shortest(answers: list[str], responses: list[str]) -> dict[str, float]:
    assert len(answers) == len(responses)
    return {"shortest": min(map(len, answers))}


# -- names and objects ------------------------------------------------------------------------


def test_a_function_and_its_name_are_the_same_config(settings: Settings) -> None:
    config = Config.read(settings())
    by_function = with_own(
        config, None, own_code.make_model, own_code.make_tokenizer, own_code.rows,
        own_code.smoothed, own_code.top_two,
    )  # fmt: skip
    names = (f"{HERE}:{x}" for x in ("make_model", "make_tokenizer", "rows", "smoothed", "top_two"))
    assert by_function == with_own(config, None, *names)
    assert dict(named(by_function)) == {k: v for k, v in ALL.items() if str(v).startswith("py:")}
    assert with_own(config) is config


@pytest.mark.parametrize("text", ["mine", "mine:", ":f", "my module:f", "a.b:c d"])
def test_a_text_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be \"package.module:function\""):
        name_of(text)


def test_live_objects_are_fit_for_one_worker_and_are_left_as_they_were(settings: Settings) -> None:
    torch.manual_seed(3)
    model, tables = own_code.Bag(("animal", "colour", "number")), {
        i: own_code.rows(i) for i in (None, 0, 1, 2)
    }  # fmt: skip
    before = {k: x.clone() for k, x in model.state_dict().items()}
    given = Config.read(settings(**quick("fedavg"), **{"lora.target-modules": "inner,outer"}))
    tokenizer = own_code.make_tokenizer()
    config = with_own(given, None, model, tokenizer, tables, lambda x, y: own_code.smoothed(x, y))
    assert played(config).rounds[-1]["round"] == 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    many = config.model_copy(update={"simulate": config.simulate.model_copy(update={"workers": 2})})
    found = [*preflight.problems(many)]
    assert len(found) == 4
    assert all("fit for simulate.workers = 1 alone" in x for x in found)


def test_a_live_object_is_another_processs_no_more() -> None:
    with pytest.raises(ConfigError, match="this object is in another process"):
        find("train.loss", "py:live:gone-1")


# -- strategies ---------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))


def test_a_strategy_object_goes_into_the_config_with_its_options(
    settings: Settings, fresh: None
) -> None:
    config = Config.read(settings())
    register_strategy("mine", Mine, states=(Padded,))
    chosen = with_own(config, Mine(far=0.5))
    assert chosen.build_strategy() == Mine(far=0.5)
    assert with_own(config, Mine).build_strategy() == Mine()
    assert with_own(config, "fedavg").strategy.name == "fedavg"
    for cls in STRATEGIES.values():
        assert with_own(config, cls()).build_strategy() == cls()


def test_a_strategy_that_nobody_registered_is_refused(settings: Settings, fresh: None) -> None:
    class Other(FedAvg):
        pass

    with pytest.raises(StrategyError, match=r"Other is not registered.*register_strategy\(\"other"):
        with_own(Config.read(settings()), Other())


# -- who may run it -------------------------------------------------------------------------------


def test_a_node_runs_no_code_that_it_was_not_told_of(settings: Settings) -> None:
    given = settings(**quick("fedavg", **ALL))
    app = make_client_app(model=own_code.make_model, tokenizer=own_code.make_tokenizer)
    with pytest.raises(FedLoraError, match=r"data.path = 'py:.*:rows': this node runs no code"):
        federate(given, app)
    allowed = {i: {"user-code": ",".join(v for _, v in named(Config.read(given)))}
               for i in range(3)}  # fmt: skip
    other = {**given, "run.name": "told"}
    assert federate(other, client_app(), nodes=allowed).rounds[-1]["round"] == 2


def test_an_apps_data_are_the_nodes_rows(settings: Settings) -> None:
    given = settings(**quick("fedavg", **BAG))
    app = make_client_app(model=own_code.make_model, tokenizer=own_code.make_tokenizer, data=some)
    ran = federate(given, app)
    assert [c["examples"] for c in ran.rounds[-1]["clients"].values()] == [9, 18, 27]


def some(client: int | None) -> Dataset:
    """10, 20 and 30 rows, of which the client's own test takes a tenth."""
    assert client is not None
    return own_code.rows(client).select(range(10 + 10 * client))


def test_two_flower_apps_of_ones_own(settings: Settings) -> None:
    """A ServerApp with `Federation` in it and a ClientApp made by `make_client_app`."""
    given = settings(**quick("fedavg"), **{"lora.target-modules": "inner,outer"})
    own: dict[str, Any] = {
        "model": f"{HERE}:make_model",
        "tokenizer": own_code.make_tokenizer,
        "data": own_code.rows,
        "loss": own_code.smoothed,
        "metrics": own_code.top_two,
    }
    server, ended = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        made = Federation(Config.read(context.run_config), strategy=FedAvg(), **own)
        ended.append(made.start(grid))

    run_local(server, make_client_app(**own), Config.read(given).flat(), 3)
    assert len(ended[0].arrays) > 0
    assert Ran(directory_of(given)).rounds[-1]["round"] == 2


def test_a_client_refuses_a_server_that_changed_its_config_by_itself(settings: Settings) -> None:
    """Or it would train at another rate, or with another strategy's client half, in silence."""
    given = Config.read(settings(**quick("fedavg")))
    changed = Config.read({**given.flat(), "train.lr": 0.1})
    with (
        LocalGrid(client_app(), 3, given.flat()) as grid,
        pytest.raises(FedLoraError, match=r"run config has digest \w+, must be the server's"),
    ):
        Federation(changed).start(grid)


def test_what_federation_was_given_reaches_the_clients(settings: Settings) -> None:
    given = Config.read(settings(**quick("fedsa")) | {"clients.ranks": "3"})
    with LocalGrid(client_app(), 3, given.flat()) as grid:
        Federation(given, strategy=STRATEGIES["fedavg"]()).start(grid)
    by_argument = Ran(Path(given.run.out, given.run.name))
    named_so = federate(settings(**quick("fedavg"), **{"run.name": "named"}))
    assert by_argument.adapter == named_so.adapter


def test_an_app_hands_its_names_to_the_nodes_worker() -> None:
    """In the node config, which goes with the message; what the node says itself comes first."""
    app = make_client_app(data="mine:rows", loss="mine:loss")
    context = Context(1, 2, {"data-path": "own"}, RecordDict(), {})
    with LocalGrid(app, 1, {}) as grid:
        message = grid.create_message(RecordDict(), "query", 1000, "1")
        app(message, context)
    assert context.node_config["user-code"] == "py:mine:rows,py:mine:loss"
    assert context.node_config["data-path"] == "own"


def test_a_client_whose_source_differs_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ClientJob.open

    def other(message: Any, context: Any) -> ClientJob:
        job = before(message, context)
        return replace(job, job=replace(job.job, code="0123456789abcdef"))

    monkeypatch.setattr(ClientJob, "open", other)
    with pytest.raises(FedLoraError, match=r"source of .*own_code:smoothed.* is not the server's"):
        played(Config.read(settings(**quick("fedavg", **ALL))))


def test_a_config_without_code_has_no_identity_and_another_value_another(
    settings: Settings,
) -> None:
    config = Config.read(settings(**quick("fedavg")))
    assert identity(config) == ""
    found = {
        identity(Config.read(settings(**quick("fedavg", **given))))
        for given in (ALL, BAG, {**ALL, "train.loss": f"py:{HERE}:mean_loss"})
    }
    assert len(found) == 3
    assert "" not in found


MINE = """
from tests.support import own_code

def loss(logits, labels):
    return {factor} * own_code.smoothed(logits, labels)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the working directory's `mine_here.py` as in a new process."""
    import sys

    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "mine_here.py").write_text(text)
        sys.modules.pop("mine_here", None)
        import importlib

        importlib.invalidate_caches()

    yield write
    sys.modules.pop("mine_here", None)


def test_a_run_whose_code_was_edited_does_not_go_on(
    settings: Settings, module: Callable[[str], None]
) -> None:
    module(MINE.format(factor=1))
    given = settings(**quick("fedavg", **BAG)) | {"train.loss": "py:mine_here:loss"}
    given |= {"train.lr-schedule": "constant"}
    played(Config.read(given))
    more = {**given, "run.rounds": 3, "run.resume": True}
    module(MINE.format(factor=2))
    with pytest.raises(CheckpointError, match=r"train.loss: the source of py:mine_here:loss was"):
        played(Config.read(more))
    module(MINE.format(factor=1))
    assert played(Config.read(more)).rounds[-1]["round"] == 3
    notes = sources(Config.read(given))
    assert notes.keys() == {"model.path", "model.tokenizer", "train.loss"}


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"train.loss": "py:nowhere_at_all:f"}, ConfigError, "no module nowhere_at_all, from /"),
        ({"train.loss": f"py:{HERE}:nothing"}, ConfigError, "has no function nothing"),
        ({"train.loss": f"py:{HERE}:LABELS"}, ConfigError, "has no function LABELS"),
        ({"model.path": f"py:{HERE}:make_tokenizer"}, ConfigError, "it fails: TypeError"),
        ({"model.path": "py:builtins:len"}, ConfigError, "it gives a int, must be Module"),
        ({"model.tokenizer": "py:builtins:dict"}, ConfigError, "must be PreTrainedTokenizerBase"),
        ({"data.path": "py:builtins:repr"}, ConfigError, "it gives a str, must be Dataset"),
        ({"data.path": f"py:{__name__}:empty"}, DataError, "it has no rows as the central test"),
        ({"data.path": f"py:{__name__}:same"}, DataError, "all rows of client 0 are central test"),
        ({"data.path": f"py:{__name__}:headless"}, DataError, "has no such column"),
        ({"train.loss": f"py:{HERE}:mean_loss"}, FedLoraError, "one loss an example"),
        ({"evaluate.metrics": f"py:{__name__}:wordy"}, ModelError, "must be numbers by name"),
        ({"model.path": f"py:{__name__}:silent"}, ModelError, "forward gives a dict without"),
        ({"lora.target-modules": "query"}, ModelError, "it has inner, outer"),
    ],
)
def test_a_mistake_is_said_before_round_1_with_the_key(
    settings: Settings, change: dict[str, object], error: type[Exception], words: str
) -> None:
    given = settings(**{**quick("fedavg", **ALL), "evaluate.every": 1, **change})
    with pytest.raises(error, match=words):
        played(Config.read(given))
    rounds = directory_of(given) / "rounds.jsonl"
    lines = rounds.read_text().splitlines() if rounds.exists() else []
    assert not [r for r in map(json.loads, lines) if r["round"] > 0]


def empty(client: int | None) -> Dataset:
    return Dataset.from_dict({"text": [], "label": []})


def same(client: int | None) -> Dataset:
    return own_code.rows(0)


def headless(client: int | None) -> Dataset:
    return Dataset.from_dict({"words": ["a"], "label": ["b"]})


def wordy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, str]:
    return {"good": "very"}


class Silent(own_code.Bag):
    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:  # type: ignore[override]
        return {"out": super().forward(input_ids, **rest)}


def silent(labels: tuple[str, ...]) -> torch.nn.Module:
    return Silent(labels)
