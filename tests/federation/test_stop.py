"""A run ends where a hand computation says, and its result is the best round's to the bit."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given as drawing
from hypothesis import strategies as st
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, StrategyError
from fedlora.federation.server import choice, loop
from fedlora.federation.server.choice import judged, metric_of, over
from fedlora.reports import report, tables
from fedlora.reports.run_files import read
from tests.federation.test_resume import kill_at
from tests.support.long import few
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]
VALIDATES = {"data.validation-size": 20, "train.lr-schedule": "constant"}
STOPS = {**VALIDATES, "stop.patience": 2, "run.rounds": 6}
OWN = {"data.client-validation-fraction": 0.3, "stop.patience": 3, "run.rounds": 3}


def played(scores: Sequence[float | None], **stop: object) -> tuple[int, dict[str, Any]]:
    """The last round of a run with these scores after rounds 0, 1, ..., and its best round."""
    config = Config.read({f"stop.{k.replace('_', '-')}": v for k, v in stop.items()})
    best: dict[str, Any] = {}
    for number, value in enumerate(scores):
        best = dict(judged(config, best, number, None if value is None else {"loss": value}))
        if over(config, best, number):
            return number, best
    return len(scores) - 1, best


@pytest.mark.parametrize(
    ("scores", "stop", "last", "best"),
    [
        # by hand: round 2 is the best, 3 and 4 are not better
        ([1.0, 0.8, 0.5, 0.6, 0.5, 0.4], {"patience": 2}, 4, 2),
        # equal is no better
        ([1.0, 1.0, 1.0, 0.1], {"patience": 2}, 2, 0),
        # a better one within the patience begins the count anew
        ([1.0, 1.1, 0.9, 1.0, 0.8, 0.9, 0.9], {"patience": 2}, 6, 4),
        # better by 0.1 is not better by more than 0.2
        ([1.0, 0.9, 0.85, 0.1], {"patience": 2, "min_delta": 0.2}, 2, 0),
        # not a number is a round without a better score, and so is one that nobody tells
        ([1.0, math.nan, None, 0.1], {"patience": 2}, 2, 0),
        ([math.nan, 1.0, 2.0], {"patience": 2}, 2, 1),
        # without patience it has all its rounds
        ([1.0, 2.0, 3.0, 4.0], {"best": True}, 3, 0),
    ],
)
def test_a_run_ends_at_the_round_that_a_hand_computation_says(scores, stop, last, best) -> None:
    ended, found = played(scores, **stop)
    assert (ended, found["round"]) == (last, best)


@drawing(
    st.lists(st.floats(0, 2, width=16), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25]),
)
def test_it_ends_where_the_slow_definition_does(scores, patience, delta) -> None:
    """Slowly: walk the rounds; a record is what beats the record before it by more than delta."""
    records = [0]
    last = len(scores) - 1
    for n in range(1, len(scores)):
        if scores[n] < scores[records[-1]] - delta:
            records.append(n)
        if n - records[-1] == patience:
            last = n
            break
    ended, best = played(scores, patience=patience, min_delta=delta)
    assert (ended, best["round"]) == (last, records[-1])


def test_which_way_is_better_is_the_metrics_own_or_its_sign() -> None:
    def more(name: str, scores: dict[str, float]) -> tuple[str, bool]:
        found = metric_of(Config.read({"stop.metric": name}), scores)
        return found.key, found.more

    assert more("", {"loss": 1.0, "accuracy": 0.5}) == ("accuracy", True)
    assert more("", {"loss": 1.0, "perplexity": 2.7}) == ("loss", False)
    assert more("loss", {}) == ("loss", False)
    assert more("-mae", {}) == ("mae", False)
    assert more("+mcc", {}) == ("mcc", True)


def scored_as(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Validation rows are scored so, round by round."""

    def validated(setting: Any, session: Any, run: Any, grid: Any, number: int) -> Any:
        return {"loss": values[number]}

    monkeypatch.setattr(loop, "validated", validated)


def test_a_run_ends_early_and_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    scored_as(monkeypatch, [1.0, 0.8, 0.5, 0.6, 0.7, 0.1])
    given = settings(**quick("fedex", **STOPS))
    ran = federate(given)
    assert [r["round"] for r in ran.rounds] == [0, 1, 2, 3, 4]
    found = ran.summary["chosen"]
    assert (found["best_round"], found["value"], found["last_round"]) == (2, 0.5, 4)
    assert found["result"] == 4
    assert found["ended"].startswith("after round 4: in 2 rounds no validation score was better")
    assert ran.summary["rounds"] == 4
    assert not ran.summary["stopped"]  # it is whole
    assert dict(tables.chosen(read(ran.directory)))["the model is of"] == "round 4 of 4"
    report.write(ran.directory)
    before = ran.adapter
    again = federate({**given, "run.resume": True})
    assert [r["round"] for r in again.rounds] == [0, 1, 2, 3, 4]
    assert again.adapter == before


@pytest.mark.parametrize("name", few(["fedavg", "fedex"], "fedex"))
def test_the_best_rounds_model_is_the_result_to_the_bit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """fedex moves the base: the result then lies on an older base than the clients have."""
    scored_as(monkeypatch, [1.0, 0.8, 0.5, 0.6, 0.7, 0.9])
    more = {**VALIDATES, "evaluate.clients": True, "evaluate.every": 1}
    best = federate(settings(**quick(name, **more, **{"run.rounds": 5, "stop.best": True})))
    short = federate(settings(**quick(name, **more, **{"run.rounds": 2, "run.name": "short"})))
    last = federate(settings(**quick(name, **more, **{"run.rounds": 5, "run.name": "last"})))
    assert best.adapter == short.adapter
    assert best.adapter != last.adapter
    assert best.summary["final"] == short.summary["final"] == best.rounds[2]["evaluation"]
    assert finals(best) == finals(short) != finals(last)
    assert best.summary["chosen"]["result"] == 2
    assert not any(r["failures"] for r in best.rounds)


def finals(ran: Ran) -> list[str]:
    """What each client makes of the result, from clients.jsonl."""
    lines = (ran.directory / "clients.jsonl").read_text().splitlines()
    return [line[line.index('"final"') : line.index('"personal"')] for line in lines]


def test_the_best_rounds_model_is_exported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    scored_as(monkeypatch, [1.0, 0.8, 0.6, 0.7, 0.7])
    ran = federate(settings(**quick("fedavg", **VALIDATES, **{"run.rounds": 4, "stop.best": True})))
    out = tmp_path / "out"
    done = CliRunner().invoke(get_command(app), ["export", str(ran.directory), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "adapter_model.safetensors").read_bytes() == ran.adapter
    assert "the model is that of round 2, chosen among 4 rounds" in (out / "README.md").read_text()
    kept = sorted(x.stem for x in (ran.directory / "checkpoint").glob("*.safetensors"))
    assert kept == ["round-00002", "round-00003", "round-00004"]
    (ran.directory / "checkpoint" / "round-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="round-00002"):
        CliRunner().invoke(get_command(app), ["export", str(ran.directory), "--out", str(out)],
                           catch_exceptions=False)  # fmt: skip


@pytest.mark.parametrize("point", ["mid-client", "checkpoint-kept"])
def test_killed_and_resumed_a_run_chooses_and_ends_as_if_it_had_not_been(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    scored_as(monkeypatch, [1.0, 0.8, 0.5, 0.6, 0.7, 0.1])
    more = {**STOPS, "stop.best": True}
    whole = federate(settings(**quick("fedex", **more)))
    given = settings(**quick("fedex", **more, **{"run.name": "killed"}))
    kill_at(point, 3, given)
    resumed = federate({**given, "run.resume": True})
    assert resumed.metrics == whole.metrics
    assert resumed.adapter == whole.adapter
    assert resumed.summary["chosen"] == whole.summary["chosen"]


def test_a_round_that_was_scored_and_not_kept_is_played_again(settings: Settings) -> None:
    """fedsa's clients hold a factor of each round: scoring a round lets go of none."""
    given = settings(**quick("fedsa", **OWN))
    kill_at("half-a-checkpoint", 2, given)
    resumed = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert resumed.adapter == whole.adapter
    assert resumed.metrics == whole.metrics


def test_where_the_server_has_none_the_clients_own_rows_choose(settings: Settings) -> None:
    """Each client's score counts once: the median, by hand, of what each says."""
    told: list[dict[int, float]] = []
    real = choice.scores_of

    def heard(said: Any, prefix: str) -> Any:
        found = real(said, prefix)
        if prefix == "validation.":
            told.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "scores_of", heard)
        ran = federate(settings(**quick("fedsa", **OWN)))
    assert len(told) == 3 * 4
    for r, said in zip(ran.rounds, zip(*[iter(told)] * 3, strict=True), strict=True):
        losses = [x["loss"] for x in said]
        assert r["validation"]["loss"] == sorted(losses)[1]
        assert r["validation"]["clients"] == 3


@drawing(st.lists(st.floats(0.1, 5.0), min_size=3, max_size=9), st.data())
def test_fewer_than_half_that_lie_move_what_a_run_chooses_by_no_further_than_the_others_say(
    honest: list[float], data: st.DataObject
) -> None:
    lies = data.draw(st.lists(st.sampled_from([1e9, -1e9, 0.0]), max_size=len(honest) - 1))
    said = [{"loss": x} for x in (*honest, *lies)]
    assert min(honest) <= choice.middle(said)["loss"] <= max(honest)


def test_a_mean_would_be_the_liars_own() -> None:
    """A counterexample, and what only one of them tells does not count at all."""
    said = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 1e9, "f1": 1.0}]
    assert choice.middle(said) == {"loss": 2.0}
    assert sum(x["loss"] for x in said) / 3 > 1e8


def test_a_score_that_there_is_not_is_named_before_round_1(settings: Settings) -> None:
    given = settings(**quick("fedex", **STOPS, **{"stop.metric": "+mcc"}))
    with pytest.raises(StrategyError, match=r"'\+mcc': validation rows are not scored so; there"):
        federate(given)
    assert (directory_of(given) / "rounds.jsonl").read_text() == ""
