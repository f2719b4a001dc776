"""Runs that learned nothing, stood still, diverged or fell back say so; healthy ones do not."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.federation.server.loop import FederatedLora
from fedlora.reports import report
from fedlora.reports.console import Silent
from fedlora.reports.outcome import FALLEN, FLOORS, STILL, judge, said
from fedlora.reports.units import percent
from tests.conftest import CUES
from tests.federation.test_bad_clients import Bad, metric, poison
from tests.reports.test_report import Page, change, make_run
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]
ROWS = 500


def scores(value: float | None, key: str = "accuracy") -> dict[str, Any] | None:
    return None if value is None else {key: value, "examples": ROWS}


def records(
    values: Sequence[float | None], losses: Sequence[float | None] = (), key: str = "accuracy"
) -> list[dict[str, Any]]:
    """Rounds from 0 on, of these central scores; the losses, by default falling, from 1 on."""
    losses = losses or [2.0 / n for n in range(1, len(values))]
    return [
        {"round": n, "evaluation": scores(value, key), "train_loss": losses[n - 1] if n else None}
        for n, value in enumerate(values)
    ]


HEALTHY = records([0.17, 0.60, 0.74, 0.81])
BASELINES = {
    "majority class": {"accuracy": 0.23},
    "TF-IDF + logistic regression": {"accuracy": 0.83},
    "trained head only": {"accuracy": 0.74},
}


# -- the final score ------------------------------------------------------------------------------


def test_a_healthy_run_says_nothing() -> None:
    assert judge(HEALTHY, BASELINES, scores(0.81)) == []


def test_preferences_are_judged_by_the_margin_and_not_by_what_rounding_prefers() -> None:
    fell, grew = ([{**found, "evaluation": {"margin": margin, "accuracy": 0.6}}
                   for found, margin in zip(records([0, 0]), (0.0, end), strict=True)]
                  for end in (-0.2, 0.2))  # fmt: skip
    assert judge(grew, {}, grew[-1]["evaluation"]) == []
    (told,) = judge(fell, {}, fell[-1]["evaluation"])
    assert told == "The final margin, -0.2000, is no better than: untrained model 0.0000."


def test_every_row_right_is_no_worse_for_a_head_that_has_them_too() -> None:
    as_good = {"majority class": {"accuracy": 0.23}, "trained head only": {"accuracy": 1.0}}
    assert judge(HEALTHY, as_good, scores(1.0)) == []
    (told,) = judge(HEALTHY, {"majority class": {"accuracy": 1.0}}, scores(1.0))
    assert "no better than: majority class 100.0%" in told


def test_a_score_below_the_majority_class_is_said_with_the_figures() -> None:
    (told,) = judge(records([0.15, 0.16, 0.16]), BASELINES, scores(0.16))
    assert told == (
        "The final accuracy, 16.0%, is no better than: majority class 23.0%, "
        "trained head only 74.0%."
    )


def test_a_score_between_the_majority_class_and_the_trained_head_names_the_head_alone() -> None:
    (told,) = judge(records([0.17, 0.50]), BASELINES, scores(0.50))
    assert "trained head only 74.0%" in told
    assert "majority" not in told


def test_to_score_what_the_majority_class_does_is_to_have_learned_nothing() -> None:
    head = {"majority class": {"accuracy": 0.23}}
    assert judge(records([0.17, 0.23]), head, scores(0.23))
    assert not judge(records([0.17, 0.232]), head, scores(0.232))


def test_a_baseline_that_read_the_words_itself_is_no_bar() -> None:
    best = {"TF-IDF + logistic regression": {"accuracy": 0.99}}
    assert judge(HEALTHY, best, scores(0.81)) == []


def test_without_baselines_the_untrained_model_is_the_bar() -> None:
    (told,) = judge(records([0.30, 0.28]), {}, scores(0.28))
    assert told == "The final accuracy, 28.0%, is no better than: untrained model 30.0%."
    assert judge(HEALTHY, {}, scores(0.81)) == []


@pytest.mark.parametrize("key", ["perplexity", "loss"])
def test_where_less_is_better_the_untrained_model_is_the_bar_as_well(key: str) -> None:
    (told,) = judge(records([31.5, 32.5], key=key), {}, scores(32.5, key))
    assert told == f"The final {key}, 32.50, is no better than: untrained model 31.50."
    assert judge(records([31.5, 12.5], key=key), {}, scores(12.5, key)) == []


@pytest.mark.parametrize("value", [math.inf, math.nan, None])
def test_a_final_score_that_is_no_number_is_said_also_where_the_file_has_null(
    value: float | None,
) -> None:
    final = {"loss": value, "perplexity": value, "examples": ROWS}
    assert judge(records([31.5, 20.5], key="perplexity"), {}, final) == [
        "The final perplexity is no finite number."
    ]


# -- the training loss ----------------------------------------------------------------------------


def test_a_training_loss_that_never_moved_is_said() -> None:
    still = [math.log(6)] * 4
    (told,) = judge(records([None] * 5, still), {}, None)
    assert told == "The training loss never moved: 1.7918 in round 1, 1.7918 in round 4."


def test_a_loss_moved_if_it_did_in_any_round_by_more_than_a_ten_thousandth() -> None:
    assert judge(records([None] * 4, [2.0, 2.0 + 3 * STILL, 2.0]), {}, None) == []
    assert judge(records([None] * 4, [2.0, 2.0 + STILL, 2.0]), {}, None)
    assert judge(records([None] * 3, [2e-6, 1e-6]), {}, None) == [], "its size is the measure"
    assert judge(records([None] * 3, [0.0, 0.0]), {}, None) == [], "nothing is left to learn"


def test_one_round_is_too_few_to_stand_still() -> None:
    assert judge(records([0.17, 0.81], [1.8]), BASELINES, scores(0.81)) == []
    assert judge(records([0.17, 0.7, 0.81], [1.8, None]), BASELINES, scores(0.81)) == []
    assert judge(records([0.17, 0.7, 0.81], [1.8, math.nan]), BASELINES, scores(0.81)) == []


def test_losses_that_nobody_tells_speak_for_nothing() -> None:
    assert judge(records([0.17, 0.7, 0.81], [None, None]), BASELINES, scores(0.81)) == []


def test_a_client_whose_loss_was_not_finite_is_named_with_its_first_round() -> None:
    rounds = records([0.17, 0.6, 0.7, 0.81])
    rounds[2]["loss_not_finite"] = [3]
    rounds[3]["loss_not_finite"] = [0, 3]
    (told,) = judge(rounds, BASELINES, scores(0.81))
    assert told == (
        "The training loss was no finite number: client 0 (first in round 3), "
        "client 3 (first in round 2)."
    )


def test_of_many_such_clients_five_are_named() -> None:
    rounds = records([0.17, 0.81])
    rounds[1]["loss_not_finite"] = list(range(40))
    (told,) = judge(rounds, BASELINES, scores(0.81))
    assert told.endswith("client 4 (first in round 1) and 35 more.")


# -- the best round -------------------------------------------------------------------------------


def test_a_run_that_ended_below_its_best_round_by_more_than_noise_says_which() -> None:
    (told,) = judge(records([0.17, 0.90, 0.80]), BASELINES, scores(0.80))
    assert told == (
        "The run ended worse than its best round, by more than noise: accuracy 80.0%, after 90.0% "
        "in round 1."
    )


def test_two_standard_errors_of_the_difference_are_noise() -> None:
    """Of a hundred rows: 2 sqrt((0.9 0.1 + p (1 - p)) / 100) is 10.0 points at p = 0.80."""
    few = {"examples": 100}
    assert not judge(records([0.17, 0.90, 0.801]), {}, {"accuracy": 0.801, **few})
    assert judge(records([0.17, 0.90, 0.799]), {}, {"accuracy": 0.799, **few})
    many = {"examples": 10_000}
    assert judge(records([0.17, 0.90, 0.89]), {}, {"accuracy": 0.89, **many})


def test_what_is_no_share_falls_by_more_than_a_twentieth_of_its_best() -> None:
    best = 20.0
    for by, fell in ((0.9 * FALLEN, False), (1.1 * FALLEN, True)):
        last = best * (1 + by)
        rounds = records([31.5, best, last], key="perplexity")
        assert bool(judge(rounds, {}, scores(last, "perplexity"))) == fell


def test_rounds_without_an_evaluation_are_passed_over() -> None:
    """evaluate.every = 3, or clients that keep a part to themselves until the end."""
    assert judge(records([0.17, None, None, 0.81, None, None]), BASELINES, scores(0.82)) == []
    (told,) = judge(records([0.17, None, 0.95, None]), BASELINES, scores(0.80))
    assert "95.0% in round 2" in told
    assert judge(records([0.17, None, None]), BASELINES, scores(0.82)) == []


# -- what a run does not tell ---------------------------------------------------------------------


def test_without_a_central_test_only_the_losses_are_judged() -> None:
    assert judge(records([None, None, None]), {}, None) == []
    assert judge(records([None, None, None], [1.5, 1.5]), {}, None)
    assert judge([], {}, None) == []


def test_all_that_is_wrong_is_one_line() -> None:
    rounds = records([0.17, 0.9, 0.16], [1.8, 1.8])
    rounds[1]["loss_not_finite"] = [1]
    found = judge(rounds, BASELINES, scores(0.16))
    assert [text.split()[1] for text in found] == ["final", "training", "training", "run"]
    assert "\n" not in said(found)
    assert said(found).startswith("warning: The final accuracy, 16.0%, is no better than")
    assert all(text in said(found) for text in found)


# -- whole federations ----------------------------------------------------------------------------


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def hear(self, server: FederatedLora) -> None:
        server.observer = self

    @property
    def warned(self) -> list[str]:
        return [text for text in self.said if text.startswith("warning: ")]


def summary(ran: Ran) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran.directory / "summary.json").read_text())
    return found


@pytest.fixture
def skewed(tmp_path: Path) -> dict[str, object]:
    """Rows of one word each, four fifths of them of one label: what a constant model can score."""
    chance = random.Random(5)
    labels = ["animal"] * 8 + ["colour", "number"]
    drawn = [labels[n % 10] for n in range(160)]
    rows = [{"text": chance.choice(CUES[label]), "label": label} for label in drawn]
    path = tmp_path / "skewed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"data.path": str(path), "data.dedupe": False, "evaluate.baselines": True}


HELPLESS: dict[str, object] = {"train.lr": 1e-9, "evaluate.every": 1}
LEARNS: dict[str, object] = {
    "run.rounds": 8, "train.steps": 20, "train.lr": 6e-3, "model.pooling": "mean",
    "lora.alpha": 4.0, "clients.ranks": "3", "evaluate.every": 1,
}  # fmt: skip


def test_a_federation_that_ends_below_its_majority_class_says_so_everywhere(
    settings: Settings, skewed: dict[str, object]
) -> None:
    notes = Notes()
    ran = federate(settings(**quick("fedavg", **HELPLESS, **skewed)), before=notes.hear)
    found = summary(ran)
    majority = found["baselines"]["majority class"]["accuracy"]
    assert set(FLOORS) < set(found["baselines"])
    assert found["final"]["accuracy"] < majority
    (why,) = found["warnings"]
    assert f"majority class {percent(majority)}" in why
    assert notes.warned == [said([why])]
    page = Page(report.write(ran.directory, plots=False))
    assert page.text.index(why) < page.text.index("finished")


def test_a_federation_that_learns_says_nothing(
    settings: Settings, skewed: dict[str, object]
) -> None:
    notes = Notes()
    ran = federate(settings(**quick("fedavg", **{**skewed, **LEARNS})), before=notes.hear)
    found = summary(ran)
    assert found["final"]["accuracy"] > found["baselines"]["trained head only"]["accuracy"]
    assert found["warnings"] == []
    assert notes.warned == []
    page = Page(report.write(ran.directory, plots=False))
    assert "Warning" not in page.text
    assert '<span class="chip good">finished</span>' in page.source


def no_number(message: Any, reply: Any, bad: Bad) -> Any:
    """What divergence sends: neither loss nor factors are numbers."""
    return poison(math.nan)(message, metric("loss", math.nan)(message, reply, bad), bad)


@pytest.mark.parametrize("accepted", [True, False])
def test_a_loss_that_is_no_number_is_remembered_over_a_resume_whether_or_not_it_counted(
    settings: Settings, accepted: bool
) -> None:
    given = settings(**quick("fedavg", **{"train.lr-schedule": "constant"}))
    first = Bad(metric("loss", math.nan) if accepted else no_number, rounds=(1,))
    ran = federate({**given, "run.rounds": 1}, first)
    assert ran.rounds[1]["accepted"] == ([0, 1, 2] if accepted else [0, 2])
    assert ran.rounds[1]["loss_not_finite"] == [1]
    ran = federate({**given, "run.rounds": 3, "run.resume": True})
    assert len(ran.rounds) == 4
    assert summary(ran)["warnings"] == [
        "The training loss was no finite number: client 1 (first in round 1)."
    ]


def test_a_loss_that_is_not_told_is_not_one_that_is_no_number(settings: Settings) -> None:
    private = {
        "privacy.noise-multiplier": 2.0, "privacy.sample-rate": 0.25, "privacy.microbatch": 4,
        "privacy.insecure-reproducible-noise": True, "strategy.fedsa.average-at-end": False,
        "privacy.delta": 1e-3,
    }  # fmt: skip
    ran = federate(settings(**quick("fedsa", **private, **{"evaluate.every": 1})))
    assert all(f["train_loss"] is None for r in ran.rounds[1:] for f in r["clients"].values())
    assert "loss_not_finite" not in ran.rounds[1]
    assert summary(ran)["final"] == ran.rounds[0]["evaluation"], "A alone is no model"
    assert summary(ran)["warnings"] == []


def test_where_clients_keep_a_part_the_average_at_the_end_is_what_is_judged(
    settings: Settings,
) -> None:
    ran = federate(settings(**quick("fedsa", **HELPLESS)))
    assert [bool(r["evaluation"]) for r in ran.rounds] == [True, False, False]
    assert "untrained model" in summary(ran)["warnings"][0]


def test_a_run_that_its_privacy_budget_stopped_is_judged_all_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    private = {
        "privacy.epsilon": 2.0, "privacy.sample-rate": 0.25, "privacy.delta": 1e-3,
        "privacy.ledger": str(tmp_path / "shared"), "run.rounds": 1, "evaluate.every": 1,
    }  # fmt: skip
    federate(settings(**quick("ffa", **private)))
    ran = federate(settings(**quick("ffa", **private, **{"run.name": "again"})))
    found = summary(ran)
    assert "the privacy budget is spent" in found["stopped"]
    assert found["warnings"][0].startswith("The final accuracy")


# -- on paper -------------------------------------------------------------------------------------


def test_what_is_wrong_is_the_first_thing_on_the_page(tmp_path: Path) -> None:
    why = "The final accuracy, 16.0%, is no better than: majority class 23.0%."
    run = make_run(tmp_path / "run", clients=3, rounds=2)
    change(run, lambda *run: run[2].update(warnings=[why, "And <b>more</b>."]))
    page = Page(report.write(run, plots=False))
    head, _, rest = page.source.partition("<h1>")
    assert f'<div class="stop first bad" role="alert">Warning: {why} And &lt;b&gt;' in head
    assert why not in rest
    assert '<span class="chip warn">finished</span>' in rest


def test_on_a_terminal_it_is_the_tables_first_row_and_one_line_below_that_is_never_folded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    why = "The final accuracy, 16.0%, is no better than: [bold] majority class 23.0%."
    run = make_run(tmp_path / "run", clients=3, rounds=2)
    report.closing(run, run / "report.html")
    assert "warning" not in capsys.readouterr().out
    change(run, lambda *run: run[2].update(warnings=[why, "And more."]))
    report.closing(run, run / "report.html")
    told = capsys.readouterr().out.splitlines()
    assert [x for x in told[4].split() if x.isalnum()] == ["warnings", "2"]
    assert told[-2:] == [f"warning: {why} And more.", f"report: {run / 'report.html'}"]


def test_a_run_that_has_not_ended_is_judged_by_its_losses_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clients=3, rounds=2)

    def stand_still(rounds: Any, _: Any, __: Any) -> None:
        for r in rounds:
            r["evaluation"]["accuracy"] = 0.01
        rounds[1]["train_loss"] = rounds[2]["train_loss"] = 1.75

    change(run, stand_still)
    (run / "summary.json").unlink()
    page = Page(report.write(run, plots=False))
    assert "not finished: round 2 of 6" in page.text
    assert "Warning: The training loss never moved: 1.7500 in round 1" in page.text
    assert "The final accuracy" not in page.text


@pytest.mark.parametrize("quiet", [True, False])
def test_simulate_ends_well_and_says_what_is_wrong(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    from fedlora.cli import simulate

    given = settings(**quick("fedavg", **HELPLESS))
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(given))
    simulate(path, quiet=quiet)
    told = capsys.readouterr().out
    (why,) = summary(Ran(directory_of(given)))["warnings"]
    assert why.startswith("The final accuracy")
    assert told.splitlines()[-2] == f"warning: {why}"
