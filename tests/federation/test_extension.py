"""A finished run that goes on to more rounds: what it is then, and when it may not."""

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.config.run_section import RunConfig
from fedlora.errors import BudgetSpent, CheckpointError, ConfigError, FedLoraError
from fedlora.federation.server.first_gradient import WARM_UP
from fedlora.launch.simulate.extend import extended
from fedlora.privacy.central import CentralPrivacy
from fedlora.privacy.training import PrivacyPlan
from fedlora.reports import report
from fedlora.reports.ends import ends
from fedlora.reports.run_files import read
from fedlora.strategies import STRATEGIES
from fedlora.training.schedule import learning_rate
from tests.support.killing import plant
from tests.support.long import few
from tests.support.tiny_federation import Ran, directory_of, federate, quick, read_tensors

Settings = Callable[..., dict[str, object]]


def partly(name: str, **changes: object) -> dict[str, object]:
    """Two of four clients a round, at a rate that does not follow from the number of rounds."""
    same = {"clients.count": 4, "clients.per-round": 2, "train.lr-schedule": "constant"}
    return quick(name, **{**same, **changes})


def extend(given: dict[str, object], rounds: int, schedule: str = "restart") -> dict[str, object]:
    more = extended(directory_of(given), rounds, schedule)
    return {**given, "run.resume": True, **more}


def state(ran: Ran) -> dict[str, bytes]:
    """The newest checkpoint's tensors."""
    newest = sorted((ran.directory / "checkpoint").iterdir())[-1]
    return {name: x.numpy().tobytes() for name, x in read_tensors(newest)[0].items()}


CASES = few(STRATEGIES, "fedsa", "hetlora")


@pytest.mark.parametrize("name", CASES)
def test_two_rounds_extended_to_four_are_a_run_of_four_bit_by_bit(
    settings: Settings, name: str
) -> None:
    given = settings(**partly(name))
    federate(given)
    ran = federate(extend(given, 4))
    whole = federate({**given, "run.name": "whole", "run.rounds": 4})
    assert len(state(ran)) > 3
    assert state(ran) == state(whole)
    assert ran.adapter == whole.adapter
    assert ran.metrics == whole.metrics
    assert ran.summary["rounds"] == 4


@pytest.mark.slow
def test_but_for_fedsb_of_so_many_steps_that_its_first_rate_follows_from_them(
    settings: Settings,
) -> None:
    begins = {"strategy.fedsb.init-from": "update-approx", "clients.ranks": "4"}
    given = settings(**partly("fedsb", **{**begins, "train.steps": round(1 / WARM_UP)}))
    federate(given)
    ran = federate(extend(given, 4))
    whole = federate({**given, "run.name": "whole", "run.rounds": 4})
    assert state(ran) != state(whole)


MORE: list[tuple[str, dict[str, object]]] = [
    ("fedavg", {"lora.init": "pissa", "clients.ranks": "3", "server.optimizer": "fedadam",
                "server.lr": 0.01}),
    ("fedavg", {"clients.per-round": 0, "round.buffer": 2, "clients.ranks": "3"}),
    ("fedex", {"clients.per-round": 0, "devices.classes": "a:1:10,b:0.3:10"}),
    ("fedavg", {"clients.ranks": "3", "secure.aggregation": True, "clients.per-round": 0,
                "clients.count": 4}),
    ("fedex", {"personalize.epochs": 1.0, "evaluate.clients": True, "wire.dtype": "int8"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), MORE)
def test_so_are_those_with_clocks_moments_sums_and_personal_models(
    settings: Settings, name: str, changes: dict[str, object]
) -> None:
    given = settings(**partly(name, **changes))
    federate(given)
    ran = federate(extend(given, 4))
    whole = federate({**given, "run.name": "whole", "run.rounds": 4})
    assert ran.adapter == whole.adapter
    assert ran.summary["clients"] == whole.summary["clients"]


@pytest.mark.parametrize(
    "point", few(["half-a-checkpoint", "checkpoint-kept"], "half-a-checkpoint")
)
def test_killed_as_it_is_extended_it_goes_on_to_the_same_bits(
    settings: Settings, point: str
) -> None:
    """By `--resume` alone, and by the same command once more."""
    given = settings(**partly("fedsa", **{"train.lr-schedule": "linear"}))
    federate(given)
    shutil.copytree(directory_of(given), directory_of(given).with_name("whole"))
    longer = extend(given, 4)
    if (pid := os.fork()) == 0:
        try:
            plant(point, 3)
            federate(longer)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not read(directory_of(given)).complete
    assert extended(directory_of(given), 4) == {}
    with pytest.raises(CheckpointError, match=r"has not come to its end, round 4"):
        extended(directory_of(given), 6)
    said = fedlora("simulate", "--resume", str(directory_of(given)), "--workers", "1", "--quiet")
    assert "4" in said
    whole = federate(extend({**given, "run.name": "whole"}, 4))
    ran = Ran(directory_of(given))
    assert ran.adapter == whole.adapter
    assert ran.metrics == whole.metrics


def fedlora(*arguments: str) -> str:
    done = CliRunner().invoke(get_command(app), arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_extends_says_what_the_schedules_do_and_reports_both_ends(
    settings: Settings,
) -> None:
    scored = {"evaluate.every": 1, "evaluate.clients": True}
    changes = {"train.lr-schedule": "linear", "clients.ranks": "3", **scored}
    given = settings(**partly("fedavg", **changes))
    first = federate(given).summary
    run = str(directory_of(given))
    said = " ".join(fedlora("simulate", "--resume", run, "--rounds", "4", "--workers", "1").split())
    assert "extended after round 2 by 2, to round 4; its schedules begin anew over these" in said
    assert "train.lr is 0.05 in round 3" in said
    assert "at its end after round 2" in said
    fedlora("simulate", "--resume", run, "--rounds", "5", "--schedule", "hold", "--quiet")
    ran = Ran(directory_of(given))
    assert [r["round"] for r in ran.rounds] == [0, 1, 2, 3, 4, 5]
    kept = json.loads((ran.directory / "summary-00002.json").read_text())
    assert kept == first
    table = ends(read(ran.directory))
    told = [dict(zip(table.head, (cell.text for cell in row), strict=True)) for row in table.rows]
    assert [row["end"] for row in told] == ["after round 2", "after round 4", "after round 5"]
    assert [row["schedules then"] for row in told] == ["begin anew", "stay as they are", "-"]
    accuracies = [float(row["final accuracy"].rstrip("%")) for row in told]
    assert accuracies[0] == pytest.approx(100 * first["final"]["accuracy"], abs=0.06)
    assert accuracies[2] == pytest.approx(100 * ran.summary["final"]["accuracy"], abs=0.06)
    page = report.write(ran.directory, plots=False).read_text()
    assert "Ends of this run" in page


def test_a_run_with_one_end_has_no_table_of_ends(settings: Settings) -> None:
    ran = federate(settings(**quick("fedavg", **{"run.rounds": 1, "clients.ranks": "3"})))
    assert not ends(read(ran.directory)).rows
    assert "Ends of this run" not in report.write(ran.directory, plots=False).read_text()


RATES = [
    ("", 4, [1, 3 / 4, 2 / 4, 1 / 4]),
    ("2:restart", 4, [1, 1 / 2, 1, 1 / 2]),
    ("2:hold", 4, [1, 1 / 2, 1 / 2, 1 / 2]),
    ("2:restart, 4:hold", 6, [1, 1 / 2, 1, 1 / 2, 1 / 2, 1 / 2]),
    ("2:hold, 3:restart", 6, [1, 1 / 2, 1 / 2, 1, 2 / 3, 1 / 3]),
    ("1:hold, 2:hold", 4, [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("ends_", "rounds", "want"), RATES)
def test_the_linear_rate_of_an_extended_run(ends_: str, rounds: int, want: list[float]) -> None:
    given = {"run.rounds": rounds, "run.extended": ends_, "train.lr": 1.0}
    config = Config.read({**given, "train.lr-schedule": "linear"})
    found = [learning_rate(config, n) for n in range(1, rounds + 1)]
    assert found == pytest.approx(want, rel=1e-12)
    assert config.run.planned == (int(ends_.partition(":")[0]) if ends_ else rounds)


@pytest.mark.parametrize("bad", ["2", "0:hold", "2:stop", "3:hold,2:hold", "4:hold", "two:hold"])
def test_ends_that_no_run_can_have_had_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="extended"):
        Config.read({"run.rounds": 4, "run.extended": bad})


def test_noise_stays_what_the_run_was_begun_with() -> None:
    private = {"privacy.epsilon": 8.0, "privacy.delta": 1e-3, "run.rounds": 2, "train.steps": 3}
    longer = {**private, "run.rounds": 6, "run.extended": "2:restart"}
    plans = [PrivacyPlan.of(Config.read(x), 100) for x in (private, longer)]
    assert plans[0] == plans[1]
    assert plans[0].sigma != PrivacyPlan.of(Config.read({**private, "run.rounds": 6}), 100).sigma
    central = []
    for x in (private, longer):
        config = Config.read({**x, "privacy.level": "client", "clients.count": 500})
        central.append(CentralPrivacy.of(config))
    assert central[0]
    assert central[1]
    assert central[0].z == central[1].z


PRIVATE: dict[str, object] = {
    "privacy.delta": 1e-3, "lora.layers": "-1", "train.steps": 2, "clients.ranks": "3",
    "train.optimizer": "sgd", "train.lr": 0.5, "clients.count": 2, "round.min-replies": 1,
}  # fmt: skip


def test_an_extension_beyond_the_budget_is_refused_before_any_round(settings: Settings) -> None:
    """Of 2 rounds at a noise for 8: no third. What is refused has cost the run nothing."""
    given = settings(**quick("fedavg", **{**PRIVATE, "privacy.epsilon": 8.0}))
    ran = federate(given)
    before = {p.name: p.read_bytes() for p in ran.directory.iterdir() if p.is_file()}
    with pytest.raises(
        BudgetSpent, match=r"cannot be extended: 1 more rounds.*client 0.*above the"
    ):
        extended(ran.directory, 3)
    assert before == {p.name: p.read_bytes() for p in ran.directory.iterdir() if p.is_file()}


def test_an_extension_within_the_budget_keeps_its_noise_and_counts_on(settings: Settings) -> None:
    given = settings(**quick("fedavg", **{**PRIVATE, "privacy.noise-multiplier": 1.5,
                                          "privacy.max-epsilon": 40.0}))  # fmt: skip
    spent = federate(given).summary["privacy"]["epsilon"]["0"]
    ran = federate(extend(given, 3))
    told = ran.summary["privacy"]
    assert told["sigma"]["0"] == 1.5
    assert spent < told["epsilon"]["0"] < 40
    with pytest.raises(BudgetSpent, match="above the limit of 40"):
        extended(ran.directory, 4000)


def test_rounds_are_no_longer_changed_in_passing_where_they_decide_the_noise(
    settings: Settings,
) -> None:
    """`--set run.rounds=4` of a run at a constant rate goes on with it: not where noise follows."""
    changes = {**PRIVATE, "privacy.epsilon": 8.0, "train.lr-schedule": "constant"}
    given = settings(**quick("fedavg", **changes))
    federate(given)
    with pytest.raises(CheckpointError, match=r"run\.rounds: was 2, is 4"):
        federate({**given, "run.resume": True, "run.rounds": 4})


def test_what_cannot_be_extended_is_refused_in_a_line(settings: Settings) -> None:
    given = settings(**partly("fedavg", **{"clients.ranks": "3"}))
    directory = federate(given).directory
    for rounds in (1, 2):
        with pytest.raises(CheckpointError, match=rf"--rounds {rounds}: .*has 2 rounds already"):
            extended(directory, rounds)
    with pytest.raises(ConfigError, match=r"--schedule stop: must be one of restart, hold"):
        extended(directory, 4, "stop")
    longer = {**extend(given, 4), "train.lr": 0.01}
    with pytest.raises(FedLoraError, match=r"train\.lr: was 0\.05, is 0\.01") as caught:
        federate(longer)
    assert "run.rounds" not in str(caught.value)
    assert "run.extended" not in str(caught.value)
    (directory / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"has not come to its end.*simulate --resume"):
        extended(directory, 4)


def test_a_run_that_was_stopped_is_not_extended(settings: Settings) -> None:
    given = settings(**partly("fedavg", **{"clients.ranks": "3"}))
    directory = federate(given).directory
    path = directory / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stopped": "before round 2: x"}))
    with pytest.raises(CheckpointError, match="it was stopped before round 2: x"):
        extended(directory, 4)


def test_an_end_that_the_run_never_had_is_another_configuration(settings: Settings) -> None:
    """A config may not say of itself that it is an extension."""
    given = settings(**partly("fedavg", **{"clients.ranks": "3"}))
    federate(given)
    with pytest.raises(CheckpointError, match=r"run\.extended: was '', is '1:hold'"):
        federate({**given, "run.resume": True, "run.rounds": 4, "run.extended": "1:hold"})


def test_rounds_without_a_run_say_which_key_is_meant() -> None:
    done = CliRunner().invoke(get_command(app), ["simulate", "quickstart", "--rounds", "4"])
    assert done.exit_code == 2
    assert "--set run.rounds=N" in " ".join(done.output.split())


def test_the_place_of_a_round_beyond_the_last_is_the_last_schedules() -> None:
    run = RunConfig(rounds=4, extended=("2:restart",))
    assert [run.place(n) for n in (1, 2, 3, 4, 5)] == [(1, 2), (2, 2), (1, 2), (2, 2), (3, 2)]
