"""Whose budget a charge is: no setting of a run begins it anew, and who shares no row shares none.

Rows are read by the code that a client reads them with; no model is needed.
"""

import json
import random
import stat
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import comb, prod
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import BudgetSpent, PrivacyError
from fedlora.privacy import accounting, units
from fedlora.privacy.accounting import Spend, epsilon
from fedlora.privacy.charges import OLDER, START, Charge, sealed
from fedlora.privacy.ledger import Acknowledged, Ledger
from fedlora.privacy.training import PrivacyPlan, any_of
from fedlora.privacy.units import Units
from tests.support.by_task import load, load_node

DELTA = 1e-3
SPEND = Spend(0.25, 2.0, 4)
CHARGE = Charge(SPEND, 0.3, DELTA, run="r", round=1)
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RDP bound for epsilon: at once, and it composes like the tight one."""
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


def rows(n: int = 40, start: int = 0) -> list[Row]:
    return [
        {"text": f"row {i}", "other": f"words {i}", "label": "ab"[i % 2], "who": f"p{i // 2}"}
        for i in range(start, start + n)
    ]


def node(path: Path, given: list[Row], seed: int = 0, **data: Any) -> Units:
    """The units of a node with these rows in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    config = DataConfig(**{"node_path": str(path), "client_test_fraction": 0.1, **data})
    labels = ("a", "b", "creature", "words 0")
    task = data.pop("task", "classification")
    found = load_node(config, task, labels, seed, units=True)
    return _whole(Units.of(found.train, config))


def shards(path: Path, given: list[Row], seed: int, clients: int = 2, **data: Any) -> list[Units]:
    """The units of each client of a simulation over one file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    config = DataConfig(path=str(path), partition="iid", test_size=4, **data)
    corpus = load(config, "classification", clients, seed, units=True)
    return [_whole(Units.of(c.train, config)) for c in corpus.clients]


def _whole(found: Units | None) -> Units:
    assert found is not None
    return found


def spent(ledger: Ledger, of: Units) -> float:
    return ledger.reserve(CHARGE, units=of).epsilon


def times(n: int) -> float:
    """Epsilon of n charges together."""
    return epsilon([Spend(0.25, 2.0, 4 * n)], DELTA)


def shuffled(given: list[Row]) -> list[Row]:
    return random.Random(3).sample(given, len(given))


RESETS: dict[str, Callable[[Path], Units]] = {
    "run.seed": lambda p: node(p, rows(), seed=9),
    "data.limit": lambda p: node(p, rows(), limit=10),
    "data.map": lambda p: node(p, rows(), map=("a=creature",)),
    "data.text": lambda p: node(p, rows(), text="other"),
    "data.label": lambda p: node(p, rows(), label="label", text="who"),
    "data.dedupe": lambda p: node(p, rows(), dedupe=False),
    "data.client-test-fraction": lambda p: node(p, rows(), client_test_fraction=0.5),
    "data.encoding": lambda p: node(p, rows(), encoding="latin-1"),
    "data.separator": lambda p: node(p, rows(), separator="|"),
    "data.unit-column": lambda p: node(p, rows(), unit_column="who"),
    "order of rows": lambda p: node(p, shuffled(rows())),
    "order of columns": lambda p: node(p, [dict(reversed(r.items())) for r in rows()]),
    "a column more": lambda p: node(p, [*rows(), {**rows(1, 50)[0], "note": "x"}]),
    "another file": lambda p: node(p.with_name("copy.jsonl"), rows()),
    "half of the rows": lambda p: node(p, rows(20)),
}


@pytest.mark.parametrize("what", RESETS)
def test_no_setting_of_a_run_begins_the_budget_anew(tmp_path: Path, what: str) -> None:
    ledger, path = Ledger(tmp_path), tmp_path / "rows.jsonl"
    assert spent(ledger, node(path, rows())) == times(1)
    assert spent(ledger, RESETS[what](path)) == times(2), what
    assert spent(ledger, node(path, rows())) == times(3), what


def test_a_seed_sweep_ends_at_the_budget(tmp_path: Path) -> None:
    ledger, budget = Ledger(tmp_path), times(3)
    runs = [node(tmp_path / "rows.jsonl", rows(), seed=n, limit=20 + n) for n in range(9)]
    for of in runs[:3]:
        ledger.reserve(CHARGE, budget, of)
    for of in runs[3:]:
        with pytest.raises(BudgetSpent):
            ledger.reserve(CHARGE, budget, of)


def test_one_row_more_each_day_composes_with_all_days_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for day in range(5):
        found = spent(ledger, node(tmp_path / "rows.jsonl", rows(20 + day)))
        assert found == times(day + 1)
    assert len([*ledger.sets.iterdir()]) == 5, "one file for each distinct set"


def test_disjoint_parts_of_one_file_do_not_compose_and_another_deal_of_it_does(
    tmp_path: Path,
) -> None:
    ledger, path = Ledger(tmp_path), tmp_path / "rows.jsonl"
    first = shards(path, rows(), seed=0)
    assert [spent(ledger, of) for of in first] == [times(1)] * 2
    assert [spent(ledger, of) for of in first] == [times(2)] * 2
    again = shards(path, rows(), seed=1)
    assert spent(ledger, again[0]) == times(5), "it has rows of both"
    assert ledger.epsilon(DELTA) == times(5)


def test_a_row_that_differs_by_a_letter_is_another_unless_a_column_says_whose_it_is(
    tmp_path: Path,
) -> None:
    """A counterexample: without a unit column near-duplicates are not covered."""
    near = [{**row, "text": row["text"] + "."} for row in rows()]
    bare = Ledger(tmp_path / "bare")
    spent(bare, node(tmp_path / "rows.jsonl", rows()))
    assert spent(bare, node(tmp_path / "rows.jsonl", near)) == times(1)
    by_person = Ledger(tmp_path / "by-person")
    spent(by_person, node(tmp_path / "rows.jsonl", rows(), unit_column="who"))
    assert spent(by_person, node(tmp_path / "rows.jsonl", near, unit_column="who")) == times(2)


def test_rows_of_nobody_are_left_out_where_a_unit_column_is_set(tmp_path: Path) -> None:
    given = [*rows(10), {**rows(1, 90)[0], "who": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    data = DataConfig(node_path=str(path), client_test_fraction=0.0, unit_column="who")
    found = load_node(data, "classification", ("a", "b"), units=True).train
    assert (len(found), len(set(found.unit))) == (10, 5)
    assert _whole(Units.of(found, data)).most == 2
    assert load_node(data, "classification", ("a", "b")).train.unit == (), "only where asked for"


def test_the_bound_holds_for_every_unit_whatever_sets_come_in_what_order(tmp_path: Path) -> None:
    """Held against the slow definition: each unit's own charges, one by one."""
    ledger, draw = Ledger(tmp_path), random.Random(1)
    charged: list[tuple[frozenset[bytes], Spend]] = []
    told: dict[bytes, float] = {}
    for _ in range(40):
        some = frozenset(bytes([draw.randrange(12)]) * 16 for _ in range(draw.randint(1, 5)))
        spend = Spend(draw.choice([0.1, 0.5]), draw.choice([1.0, 3.0]), draw.randint(1, 4))
        receipt = ledger.reserve(Charge(spend, 0.3, DELTA), units=Units("", some, 1))
        charged.append((some, spend))
        told |= {u: max(told.get(u, 0.0), receipt.epsilon) for u in some}
        for u, bound in told.items():
            assert epsilon([s for held, s in charged if u in held], DELTA) <= bound + 1e-9
    assert ledger.epsilon(DELTA) >= max(told.values())


@pytest.mark.parametrize(("k", "q", "sigma", "steps"), [(2, 0.1, 2.0, 20), (5, 0.02, 4.0, 50)])
def test_a_person_of_several_rows_is_charged_at_least_what_another_accountant_says(
    k: int, q: float, sigma: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: of k rows j are drawn with a binomial's chance, and move the sum by j C."""
    monkeypatch.undo()  # of _quick
    chances = [comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]
    one = pld.from_mixture_gaussian_mechanism(
        sigma, [*map(float, range(k + 1))], chances, value_discretization_interval=1e-3
    )
    exact = one.self_compose(steps).get_epsilon_for_delta(1e-5)
    ours = epsilon([Spend(any_of(k, q), sigma / k, steps)], 1e-5)
    assert exact <= ours
    assert epsilon([Spend(q, sigma, steps)], 1e-5) < exact, "one row's is too low for a person"


@pytest.mark.parametrize(("k", "q"), [(1, 0.3), (2, 0.1), (4, 0.5)])
def test_a_person_is_drawn_as_often_as_any_row_of_the_person(k: int, q: float) -> None:
    drawn = [outcome for outcome in product((True, False), repeat=k) if any(outcome)]
    chance = sum(prod(q if hit else 1 - q for hit in outcome) for outcome in drawn)
    assert any_of(k, q) == pytest.approx(chance, rel=1e-12)


def test_noise_is_calibrated_to_all_rows_of_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of _quick
    given = {"privacy.epsilon": 3.0, "privacy.sample-rate": 0.1, "train.steps": 5, "run.rounds": 2}
    config = Config.read({"model.path": "m", "data.path": "d", **given})
    one, three = (PrivacyPlan.of(config, 100, k) for k in (1, 3))
    assert three.sigma > 2 * one.sigma
    for plan in (one, three):
        spend = plan.charge(config, "r", 1, 0).spend
        assert 2.9 < epsilon([spend, spend], config.privacy.delta) <= 3.0


# -- what is kept, and who may change it -----------------------------------------------------------


def test_what_is_kept_of_rows_nobody_reads_who_has_not_the_key(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path / "a"), Ledger(tmp_path / "b")
    of = node(tmp_path / "rows.jsonl", rows())
    for each in (ledger, other):
        spent(each, of)
    kept = [p.read_bytes() for x in (ledger, other) for p in x.sets.iterdir()]
    assert all(len(x) == 16 * len(of.digests) for x in kept)
    assert kept[0] != kept[1]
    assert not any(unit in x for unit in of.digests for x in kept)
    key = ledger.directory / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    spent(ledger, of)
    assert key.read_bytes() == before, "made once"


def test_a_ledger_that_was_written_anew_with_another_sigma_is_not_believed(tmp_path: Path) -> None:
    """Fault of old: whoever could write the file could hash it again."""
    ledger = Ledger(tmp_path)
    for _ in range(3):
        ledger.reserve(CHARGE)
    lines, head = [], START
    for line in ledger.path.read_text().splitlines():
        record = json.loads(line)
        record.pop("hash")
        made, head = sealed({**record, "sigma": 50.0, "before": head})
        lines.append(made)
    ledger.path.write_text("\n".join(lines) + "\n")
    state = {"records": len(lines), "head": head}
    ledger.marker.write_text(json.dumps({**state, "mac": "0" * 64}))
    with pytest.raises(PrivacyError, match="changed"):
        ledger.reserve(CHARGE)


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_set_that_is_gone_or_changed_makes_its_charges_dearer(tmp_path: Path, harm: str) -> None:
    ledger = Ledger(tmp_path)
    one, two = shards(tmp_path / "rows.jsonl", rows(), seed=0)
    spent(ledger, one)
    (kept,) = ledger.sets.iterdir()
    kept.unlink() if harm == "gone" else kept.write_bytes(b"\0" * 16)
    units._known_to_meet.cache_clear()
    assert spent(ledger, two) == times(2)


def test_what_the_server_has_acknowledged_refuses_and_never_lowers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = ledger.reserve(CHARGE)
    backup = {p: p.read_bytes() for p in (ledger.path, ledger.marker)}
    second = ledger.reserve(CHARGE, acknowledged=Acknowledged(first.ledger, 1))
    assert (second.charges, second.epsilon) == (2, times(2))
    for low in (Acknowledged(first.ledger, 0), Acknowledged(first.ledger, 1), None):
        assert ledger.reserve(CHARGE, acknowledged=low).epsilon >= times(3)
    for path, data in backup.items():  # a disk rolled back, marker and all
        path.write_bytes(data)
    with pytest.raises(PrivacyError, match="older than what the server knows"):
        ledger.reserve(CHARGE, acknowledged=Acknowledged(first.ledger, 2))
    assert len(ledger.read().charges) == 1, "refused: nothing was written"
    with pytest.raises(PrivacyError, match="is another than"):
        ledger.reserve(CHARGE, acknowledged=Acknowledged(first.ledger + 1, 1))


def test_clients_of_one_ledger_are_told_the_same_whoever_was_first(tmp_path: Path) -> None:
    """Each its own count, which the next message acknowledges; composed is the whole ledger."""
    parts = shards(tmp_path / "rows.jsonl", rows(), seed=0)
    told = []
    for order in ((0, 1), (1, 0)):
        ledger = Ledger(tmp_path / f"{order}")
        said: dict[tuple[int, int], tuple[int, float]] = {}
        for round in (1, 2):
            for client in order:
                charge = replace(CHARGE, round=round, client=client)
                known = Acknowledged(ledger.read().opening["opened"], round - 1) if said else None
                paid = ledger.reserve(charge, 0.0, parts[client], known)
                said[round, client] = (paid.charges, paid.epsilon)
        told.append(json.dumps([said[key] for key in sorted(said)]))
        everything = ledger.reserve(replace(CHARGE, client=2))
        assert (everything.charges, everything.epsilon) == (1, times(5))
        with pytest.raises(PrivacyError, match="it has 2 charges of this run"):
            ledger.reserve(replace(CHARGE, client=0), 0.0, parts[0], Acknowledged(paid.ledger, 3))
    assert told[0] == told[1]
    assert json.loads(told[0]) == [[1, times(1)]] * 2 + [[2, times(2)]] * 2


def test_a_disk_that_was_rolled_back_is_not_found_by_a_server_that_does_not_know(
    tmp_path: Path,
) -> None:
    """A counterexample: only the next contact of the same run finds it."""
    ledger = Ledger(tmp_path)
    first = ledger.reserve(CHARGE)
    backup = {p: p.read_bytes() for p in (ledger.path, ledger.marker)}
    ledger.reserve(CHARGE)
    for path, data in backup.items():
        path.write_bytes(data)
    unchanged = Acknowledged(first.ledger, 1)
    assert ledger.reserve(CHARGE, acknowledged=unchanged).epsilon == times(2)


# -- a new disk, and the earlier format ------------------------------------------------------------


def test_where_a_policy_rules_no_ledger_begins_by_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, opens=False)
    with pytest.raises(PrivacyError, match="no privacy ledger") as caught:
        ledger.reserve(CHARGE)
    assert "node recover" in str(caught.value)
    assert not ledger.directory.exists()
    ledger.begin()
    assert ledger.reserve(CHARGE).epsilon == times(1)
    ledger.begin()
    assert ledger.reserve(CHARGE).epsilon == times(2), "begun once"


def test_what_the_operator_says_was_spent_composes_with_everything(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, opens=False)
    assert ledger.recover(1.5) is None
    known = Acknowledged(1, 7)  # of the ledger that is lost
    found = ledger.reserve(CHARGE, 3.0, node(tmp_path / "rows.jsonl", rows()), known)
    assert found.epsilon == pytest.approx(1.5 + times(1))
    assert ledger.epsilon(DELTA) == pytest.approx(1.5 + times(1))
    with pytest.raises(BudgetSpent):
        ledger.reserve(CHARGE, 1.5, shards(tmp_path / "x.jsonl", rows(20, 500), 0)[0])
    assert ledger.recover(0.5) is None
    assert ledger.epsilon(DELTA) == pytest.approx(2.0 + times(1)), "added, never in place of"


def test_a_damaged_ledger_is_put_aside_and_what_is_said_of_it_charged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(CHARGE)
    (ledger.directory / "key").unlink()
    aside = ledger.recover(4.0)
    assert aside is not None
    assert (aside / "node" / "charges.jsonl").exists()
    assert ledger.reserve(CHARGE).epsilon == pytest.approx(4.0 + times(1))


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A ledger of the earlier format: two charges under a fingerprint of rows."""
    head = START
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "known").mkdir()
    path = tmp_path / "ledgers" / "0123abcd.jsonl"
    for n in (1, 2):
        record = CHARGE.record()
        for name in OLDER:
            del record[name]
        line, head = sealed({**record, "n": n, "before": head})
        with path.open("a") as f:
            f.write(line + "\n")
    marker = tmp_path / "known" / "0123abcd.json"
    marker.write_text(json.dumps({"records": 2, "head": head}))
    return path


def test_a_ledger_of_the_earlier_format_is_charged_whatever_the_rows_are(
    before: Path, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path, opens=False)
    one, two = shards(tmp_path / "rows.jsonl", rows(), seed=0)
    assert [spent(ledger, of) for of in (one, two)] == [times(3)] * 2
    assert ledger.epsilon(DELTA) == times(4), "of whom is not known: perhaps of both"
    assert len(before.read_text().splitlines()) == 2, "and never written to"


@pytest.mark.parametrize("harm", ["gone", "all gone", "cut", "changed", "cheaper"])
def test_a_ledger_of_the_earlier_format_that_was_harmed_is_no_fresh_start(
    before: Path, tmp_path: Path, harm: str
) -> None:
    ledger = Ledger(tmp_path)
    spent(ledger, node(tmp_path / "rows.jsonl", rows()))
    lines = before.read_text().splitlines()
    if harm in ("gone", "all gone"):
        before.unlink()
    elif harm == "cut":
        before.write_text(lines[0] + "\n")
    elif harm == "changed":
        before.write_text("\n".join(lines).replace('"steps": 4', '"steps": 1') + "\n")
    if harm in ("all gone", "cheaper"):
        (tmp_path / "known" / "0123abcd.json").unlink()
    if harm == "cheaper":  # hashed again, which needs no key
        line, _ = sealed({**CHARGE.record(), "sigma": 50.0, "n": 1, "before": START})
        before.write_text(line + "\n")
    with pytest.raises(PrivacyError):
        ledger.reserve(CHARGE)
