"""The ledger: nothing leaves unpaid, whatever is killed, torn, lost or repeated."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedlora.errors import BudgetSpent, PrivacyError, RoundError
from fedlora.privacy import accounting
from fedlora.privacy import ledger as ledgers
from fedlora.privacy.accounting import Spend, epsilon
from fedlora.privacy.charges import OLDER, Charge
from fedlora.privacy.ledger import Acknowledged, Ledger
from fedlora.privacy.statement import found
from tests.support.private_setting import Build

DELTA = 1e-3
CHARGE = Charge(Spend(0.25, 2.0, 4), 0.3, DELTA, run="r", round=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RDP bound for epsilon: at once, and it composes like the tight one."""
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


def test_charges_compose_over_rounds_and_runs(tmp_path: Path) -> None:
    for run in ("a", "a", "b"):
        last = Ledger(tmp_path).reserve(Charge(CHARGE.spend, 0.3, DELTA, run=run))
    assert last.epsilon == epsilon([Spend(0.25, 2.0, 12)], DELTA)
    assert last.charges == 1, "of run b"


def test_a_line_that_names_no_client_counts_as_everyones(tmp_path: Path) -> None:
    """A run that goes on over an older ledger, where the server was told the count of all."""
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)  # to begin it
    for _ in range(3):
        record = CHARGE.record()
        for name in OLDER:
            del record[name]
        ledger._append(ledger.read(), record)
    known = Acknowledged(ledger.read().opening["opened"], 4)
    for client in (0, 1):
        paid = ledger.reserve(replace(CHARGE, client=client), acknowledged=known)
        assert paid.charges == 5
    assert paid.epsilon == epsilon([Spend(0.25, 2.0, 24)], DELTA)


def test_a_message_is_as_long_whichever_ledger_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both ends of what can be drawn; and never more than the server takes for a number."""
    for name, least in (("low", True), ("high", False)):
        draw = (lambda n: 0) if least else (lambda n: n - 1)
        monkeypatch.setattr("secrets.randbelow", draw)
        number = Ledger(tmp_path / name).reserve(CHARGE).ledger
        assert len(str(number)) == 10
        assert number < 2**31


def test_a_budget_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    budget = epsilon([Spend(0.25, 2.0, 8)], DELTA)
    for _ in range(2):
        assert ledger.reserve(CHARGE, budget).epsilon <= budget
    size = ledger.path.stat().st_size
    with pytest.raises(BudgetSpent, match=r"budget is spent.*nothing was trained"):
        ledger.reserve(CHARGE, budget)
    assert ledger.path.stat().st_size == size


def test_a_file_cut_at_any_byte_never_lowers_epsilon(tmp_path: Path) -> None:
    """Cut within the line being written: what was charged before stays, and the torn is charged."""
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    first, marker = ledger.path.read_bytes(), ledger.marker.read_bytes()
    ledger.reserve(CHARGE)
    whole = ledger.path.read_bytes()
    for cut in {len(first) + 1, len(first) + 40, len(whole) - 2, len(whole) - 1}:
        ledger.path.write_bytes(whole[:cut])
        ledger.marker.write_bytes(marker)  # as it was before the second charge was whole
        assert ledger.epsilon(DELTA) >= epsilon([Spend(0.25, 2.0, 8)], DELTA)
        assert ledger.reserve(CHARGE).epsilon >= epsilon([Spend(0.25, 2.0, 12)], DELTA)
        again = ledger.read()
        assert (len(again.charges), again.torn) == (3, "")
        ledger.path.write_bytes(ledger.path.read_bytes()[:-7])  # torn once more
        ledger.marker.write_bytes(marker)
        assert ledger.reserve(CHARGE).epsilon >= epsilon([Spend(0.25, 2.0, 16)], DELTA)


def test_a_torn_line_costs_the_dearer_of_its_neighbours(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    with ledger.path.open("a") as f:
        f.write('{"q": 0.')
    dear = Charge(Spend(0.5, 1.0, 9), 0.3, DELTA)
    want = epsilon([CHARGE.spend, dear.spend, dear.spend], DELTA)
    assert ledger.reserve(dear).epsilon == want
    assert ledger.epsilon(DELTA) == want


@pytest.mark.parametrize("gone", ["charges.jsonl", "known.json", "key"])
def test_a_ledger_of_which_a_part_is_gone_is_not_begun_anew(tmp_path: Path, gone: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    (ledger.directory / gone).unlink()
    with pytest.raises(PrivacyError, match="is gone") as caught:
        ledger.reserve(CHARGE)
    assert not isinstance(caught.value, BudgetSpent), "that ends a run as finished"
    assert not (ledger.directory / gone).exists()


def test_an_older_copy_of_the_ledger_is_not_believed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    backup = ledger.path.read_bytes()
    ledger.reserve(CHARGE)
    ledger.path.write_bytes(backup)
    with pytest.raises(PrivacyError, match="older than what was spent"):
        ledger.reserve(CHARGE)


@pytest.mark.parametrize("harm", ["lower", "remove", "swap"])
def test_a_changed_line_is_found(tmp_path: Path, harm: str) -> None:
    ledger = Ledger(tmp_path)
    for q in (0.1, 0.2, 0.3):
        ledger.reserve(Charge(Spend(q, 2.0, 4), 0.3, DELTA))
    lines = ledger.path.read_text().splitlines()
    if harm == "lower":
        lines[1] = lines[1].replace('"steps": 4', '"steps": 1')
    elif harm == "remove":
        del lines[1]
    else:
        lines[0], lines[1] = lines[1], lines[0]
    ledger.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(PrivacyError, match="hash chain"):
        ledger.read()


def killed(where: str, ledger: Ledger) -> int:
    """A process that is killed at a point of its charge, or between it and sending; its signal."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        if where != "unsent":
            setattr(ledgers, {"before": "sealed", "unmarked": "write_atomically"}[where], die)
        ledger.reserve(CHARGE)
        die()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("where", ["before", "unmarked", "unsent"])
def test_a_kill_at_any_point_leaves_all_that_was_sent_paid_for(tmp_path: Path, where: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    assert killed(where, ledger) == -signal.SIGKILL
    paid = 4 if where == "before" else 8  # a charge on disk counts though nothing left
    assert ledger.epsilon(DELTA) == epsilon([Spend(0.25, 2.0, paid)], DELTA)
    assert ledger.reserve(CHARGE).epsilon == epsilon([Spend(0.25, 2.0, paid + 4)], DELTA)


def test_who_charges_at_once_charges_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of a node, each between what it read and what it writes."""
    append = Ledger._append

    def slowly(ledger: Ledger, *given: Any) -> None:
        time.sleep(0.05)
        append(ledger, *given)

    Ledger(tmp_path).begin()
    monkeypatch.setattr(Ledger, "_append", slowly)
    with ThreadPoolExecutor(3) as pool:
        paid = [pool.submit(Ledger(tmp_path).reserve, CHARGE) for _ in range(3)]
    assert {x.result().charges for x in paid} == {1, 2, 3}
    assert Ledger(tmp_path).epsilon(DELTA) == epsilon([Spend(0.25, 2.0, 12)], DELTA)


# -- in a federation ---------------------------------------------------------------------------


def run(given: dict[str, object], app=None):
    from client_app.app import app as client_app
    from fedlora.config.reader import Config
    from fedlora.federation.server.loop import FederatedLora
    from fedlora.launch.simulate.grid import LocalGrid

    config = Config.read(given)
    with LocalGrid(app or client_app, config.clients.count, config.flat(), 1) as grid:
        server = FederatedLora(config)
        server.start(grid)
    return server


def lines(server) -> list[dict]:
    return [json.loads(line) for line in server.setting.journal.rounds.read_text().splitlines()]


PRIVATE = {
    "strategy.name": "ffa",
    "clients.count": 2,
    "run.rounds": 2,
    "train.steps": 2,
    "privacy.noise-multiplier": 2.0,
    "privacy.sample-rate": 0.25,
    "privacy.delta": DELTA,
}


def test_a_federation_reports_the_epsilon_of_its_ledgers(settings: Build, tmp_path: Path) -> None:
    server = run(settings("bert", **PRIVATE))
    last = lines(server)[-1]["clients"]
    for facts in last.values():
        assert facts["privacy"]["epsilon"] == pytest.approx(epsilon([Spend(0.25, 2.0, 4)], DELTA))
        told = {"train_loss", "seconds", "train_seconds", "before", "after"}
        assert all(facts[key] is None for key in told)
        assert facts["examples"] == 1
    (ledger,) = found(tmp_path)
    assert len(ledger.read().charges) == 4
    assert len({c.units for c in ledger.read().charges}) == 2
    summary = json.loads((server.setting.journal.directory / "summary.json").read_text())["privacy"]
    assert summary["epsilon"] == {i: f["privacy"]["epsilon"] for i, f in last.items()}


@pytest.mark.parametrize(("seed", "steps"), [(0, 8), (5, 12)])
def test_a_repeated_round_is_paid_for_again_and_two_runs_compose(
    settings: Build, tmp_path: Path, seed: int, steps: int
) -> None:
    """Under another seed each client has rows of both clients of the first run."""
    shared = {**PRIVATE, "privacy.ledger": str(tmp_path / "shared")}
    run(settings("bert", **shared))
    server = run(settings("bert", **shared, **{"run.name": "again", "run.seed": seed}))
    spent = [f["privacy"]["epsilon"] for f in lines(server)[-1]["clients"].values()]
    assert spent == pytest.approx([epsilon([Spend(0.25, 2.0, steps)], DELTA)] * 2)


def test_a_spent_budget_stops_the_client_with_its_reason(settings: Build, tmp_path: Path) -> None:
    given = {**PRIVATE, "privacy.epsilon": 2.0, "privacy.noise-multiplier": 0.0}
    given |= {"run.rounds": 1, "privacy.ledger": str(tmp_path / "shared")}
    run(settings("bert", **given))
    server = run(settings("bert", **given, **{"run.name": "again"}))
    summary = json.loads((server.setting.journal.directory / "summary.json").read_text())
    assert "the privacy budget is spent" in summary["stopped"]
    assert [line["round"] for line in lines(server)] == [0]


def test_a_ledger_that_is_gone_stops_the_client(settings: Build, tmp_path: Path) -> None:
    given = {**PRIVATE, "privacy.ledger": str(tmp_path / "shared")}
    run(settings("bert", **given))
    os.unlink(Ledger(tmp_path / "shared").path)
    with pytest.raises(RoundError, match="is gone"):
        run(settings("bert", **given, **{"run.name": "again"}))


def test_a_client_whose_ledger_was_rolled_back_within_a_run_sends_nothing(
    settings: Build, tmp_path: Path
) -> None:
    """By what the server says that it has; and of a private run no gradient's sketch leaves."""
    from client_app.app import app as client_app

    sketches: list[str] = []

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            asked = Message(
                message.content, message.metadata.dst_node_id, "train.gradient", ttl=9.0
            )
            sketches.append(client_app(asked, context).error.reason)
            (ledger,) = found(tmp_path) or [Ledger(tmp_path)]
            kept = tmp_path / "kept"
            if message.content["job"]["round"] == 2:  # type: ignore[index]
                shutil.rmtree(ledger.directory)
                shutil.copytree(kept, ledger.directory)
            elif ledger.directory.exists() and not kept.exists():
                shutil.copytree(ledger.directory, kept)  # before the second client's charge
        return client_app(message, context)

    (failure,) = lines(run(settings("bert", **PRIVATE), app))[-1]["failures"]
    assert failure["client"] == 1, "of whose first charge nothing is left"
    assert "older than what the server knows of" in failure["reason"]
    assert all("no noise; nothing was sent" in x for x in sketches)
    assert len(sketches) == 4


def test_a_nodes_own_limit_holds_whatever_the_run_says(settings: Build, tmp_path: Path) -> None:
    """The run counts epsilon without a limit; each of its nodes has one."""
    limit = epsilon([Spend(0.25, 2.0, 2)], DELTA)
    server = run(settings("bert", **PRIVATE, **{"privacy.max-epsilon": limit}))
    summary = json.loads((server.setting.journal.directory / "summary.json").read_text())
    assert "before round 2" in summary["stopped"]
    assert list(summary["privacy"]["epsilon"].values()) == pytest.approx([limit] * 2)
