"""The keeper alone writes a node's ledger and record, and answers whom it was told of."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.policy import Policy
from fedlora.errors import BudgetSpent, PolicyError, PrivacyError
from fedlora.federation.client import audit
from fedlora.launch.node_keeper import Keeper
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Spend, epsilon
from fedlora.privacy.charges import Charge
from fedlora.privacy.keeper import KeptLedger
from fedlora.privacy.keeper_socket import ask
from fedlora.privacy.ledger import Acknowledged, Ledger
from fedlora.privacy.units import Units
from tests.support.tiny_federation import ROOT
from tests.support.under_policy import written

DELTA = 1e-3
CHARGE = Charge(Spend(0.25, 2.0, 4), 0.3, DELTA, run="r", round=1)
SOME = Units("", frozenset([b"a" * 16, b"b" * 16]), 1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


def node(directory: Path, **privacy: Any) -> Path:
    """A policy with a keeper, and the ledger that its operator began."""
    given = {"keeper": "keeper.sock", "delta": DELTA, "ledger": "book", **privacy}
    return written(directory, "m", "rows.jsonl", privacy=given)


@contextmanager
def kept(policy: Path, allowed: set[int]) -> Iterator[Path]:
    """A keeper in a thread of this process; its socket."""
    place = Path(Policy.load(policy).privacy.keeper)
    with Keeper(place, policy, allowed) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield place
        finally:
            serving.shutdown()
            thread.join()


def test_a_receipt_of_the_keeper_is_the_ledgers(tmp_path: Path) -> None:
    policy = node(tmp_path)
    with kept(policy, {os.getuid()}) as place:
        first = KeptLedger(place).reserve(CHARGE, 0.0, SOME)
        other = Units("", frozenset([b"c" * 16]), 1)
        assert KeptLedger(place).reserve(CHARGE, 0.0, other).epsilon == first.epsilon
        again = KeptLedger(place).reserve(CHARGE, 0.0, SOME, Acknowledged(first.ledger, 2))
        assert again.epsilon == epsilon([Spend(0.25, 2.0, 8)], DELTA)
        read = ask(place, "read", {})
        assert (read["charges"], read["epsilon"]) == (3, again.epsilon)
        with pytest.raises(PrivacyError, match="older than what the server knows"):
            KeptLedger(place).reserve(CHARGE, 0.0, SOME, Acknowledged(first.ledger, 9))
    assert len(Ledger(Policy.load(policy).ledger).read().charges) == 3


def test_delta_and_the_limit_are_the_policys_whatever_a_process_of_the_node_says(
    tmp_path: Path,
) -> None:
    limit = epsilon([Spend(0.25, 2.0, 8)], DELTA)
    policy = node(tmp_path, **{"max-epsilon": limit})
    cheap = Charge(CHARGE.spend, 0.3, 0.9, run="r")
    with kept(policy, {os.getuid()}) as place:
        for _ in range(2):
            found = KeptLedger(place).reserve(cheap, 0.0, SOME)
        assert found.epsilon == pytest.approx(limit)
        with pytest.raises(BudgetSpent):
            KeptLedger(place).reserve(cheap, 200.0, SOME)
        with pytest.raises(BudgetSpent):
            KeptLedger(place).reserve(cheap, 0.0, SOME)


def test_what_is_no_request_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = node(tmp_path)
    with kept(policy, {os.getuid()}) as place:
        KeptLedger(place).reserve(CHARGE, 0.0, SOME)
        ledger = Ledger(Policy.load(policy).ledger)
        before = ledger.path.read_bytes()
        for what, more in (
            ("rewrite", {}), ("truncate", {"to": 0}), ("recover", {"spent": 0.0}),
            ("reserve", {}), ("reserve", {"charge": {**CHARGE.record(), "q": "x"}, "budget": 0}),
            ("reserve", {"charge": CHARGE.record(), "budget": 0.0, "units": -1, "most": 1,
                         "reading": ""}),
            ("reserve", {"charge": {**CHARGE.record(), "steps": -4}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "sigma": -2.0}, "budget": 0.0}),
            ("reserve", {"charge": CHARGE.record(), "budget": -1.0}),
            ("reserve", {"charge": {**CHARGE.record(), "steps": 10**400}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "round": 10**400}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "q": math.nan}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "clip": math.inf}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "unit": ["example"]}, "budget": 0.0}),
            ("reserve", {"charge": {**CHARGE.record(), "run": "r" * 10_000}, "budget": 0.0}),
            ("reserve", {"charge": CHARGE.record(), "budget": 0.0, "acknowledged": {"n": 1}}),
            ("reserve", {"charge": CHARGE.record(), "budget": 10**400}),
            (["read"], {}), ({"a": 1}, {}), ("secure", {"since": 10**30, "step": "count"}),
        ):  # fmt: skip
            with pytest.raises((PrivacyError, PolicyError)):
                ask(place, what, more)
        nested = b"[" * 100_000
        nested = len(nested).to_bytes(4, "big") + nested
        for raw in (b"", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\2[]", nested):
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(str(place))
                there.sendall(raw)
        assert ledger.path.read_bytes() == before
        assert KeptLedger(place).reserve(CHARGE, 0.0, SOME).charges == 2, "and it serves on"
    assert "Traceback" not in capfd.readouterr().err, "nobody fills its log"


def test_a_user_that_the_keeper_was_not_told_of_gets_nothing(tmp_path: Path) -> None:
    policy = node(tmp_path)
    with kept(policy, {os.getuid() + 1}) as place:
        for what in ("reserve", "read", "append"):
            with pytest.raises(PrivacyError, match="may ask nothing"):
                ask(place, what, {"charge": CHARGE.record(), "budget": 0.0})
    assert Ledger(Policy.load(policy).ledger).read().charges == ()


def test_strangers_that_come_and_go_cost_the_node_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Any user may open the socket: held open, closed at once, or never read from."""
    policy = node(tmp_path)
    with kept(policy, {os.getuid() + 1}) as place:
        held = []
        for n in range(60):
            there = socket.socket(socket.AF_UNIX)
            there.connect(str(place))
            if n % 2:
                there.close()
            else:
                held.append(there)
        with pytest.raises(PrivacyError, match="may ask nothing"):
            ask(place, "read", {})
        for there in held:
            there.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_record_that_cannot_be_written_is_a_refusal_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/keepers/own/audit.jsonl")

    monkeypatch.setattr(audit, "append", full)
    policy = node(tmp_path)
    with kept(policy, {os.getuid()}), pytest.raises(PrivacyError, match="No space left") as caught:
        audit.put(Policy.load(policy), "left", kind="train")
    assert "/keepers" not in str(caught.value)
    assert "No space left" in capfd.readouterr().err


def test_a_line_of_the_record_is_the_keepers_and_so_is_its_time(tmp_path: Path) -> None:
    policy = node(tmp_path)
    with kept(policy, {os.getuid()}):
        audit.put(Policy.load(policy), "left", kind="train", bytes=3)
        place = Path(Policy.load(policy).privacy.keeper)
        ask(place, "append", {"what": "left", "more": {"time": "never", "what": "x", "bytes": 4}})
    first, second = audit.read(Policy.load(policy).audit)
    assert (first["what"], first["bytes"]) == ("left", 3)
    assert (second["what"], second["bytes"]) == ("left", 4)
    assert second["time"] != "never"


def test_without_its_keeper_a_node_charges_and_records_nothing(tmp_path: Path) -> None:
    read = Policy.load(node(tmp_path))
    with pytest.raises(PrivacyError, match="fedlora node keeper"):
        KeptLedger(Path(read.privacy.keeper)).reserve(CHARGE)
    with pytest.raises(PrivacyError, match="fedlora node keeper"):
        audit.put(read, "asked", kind="train")
    assert not read.audit.exists()


# -- three users -----------------------------------------------------------------------------------

KEEPER, NODE, STRANGER = 61_001, 61_002, 61_003
"""Numbers that no user of a machine has."""

AS_A_NODE = """
import json, sys
from pathlib import Path
from fedlora.config.policy import Policy
from fedlora.errors import FedLoraError
from fedlora.federation.client import audit
from fedlora.privacy.accounting import Spend
from fedlora.privacy.charges import Charge
from fedlora.privacy.keeper import KeptLedger
from fedlora.privacy.units import Units

policy = Policy.load(sys.argv[1])
told = {}
try:
    units = Units("", frozenset([b"a" * 16]), 1)
    paid = KeptLedger(Path(policy.privacy.keeper)).reserve(
        Charge(Spend(0.25, 2.0, 4), 0.3, 1e-3, run="r", round=1), 0.0, units
    )
    told["charges"] = paid.charges
    audit.put(policy, "left", kind="train")
except FedLoraError as e:
    told["error"] = str(e)
for place in (sys.argv[1], policy.ledger / "ledgers/node/charges.jsonl",
              policy.ledger / "ledgers/node/known.json", policy.audit,
              Path(sys.argv[1]).parent / "node.key"):
    try:
        with open(place, "a"):
            told.setdefault("could write", []).append(str(place))
    except OSError:
        pass
for place in (policy.ledger / "ledgers/node/key", policy.ledger / "ledgers/node/charges.jsonl"):
    try:
        Path(place).unlink()
        told.setdefault("could remove", []).append(str(place))
    except OSError:
        pass
print(json.dumps(told))
"""


def user(number: int) -> list[str]:
    return ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]


def as_user(number: int, policy: Path) -> dict[str, Any]:
    """What a node's code may do as this user."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    line = [*user(number), sys.executable, "-c", AS_A_NODE, str(policy)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may look into."""
    made = Path(tempfile.mkdtemp(prefix="keeper-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root")
def test_of_three_users_the_keeper_alone_writes_and_the_node_alone_may_ask(place: Path) -> None:
    operators, keepers = place / "operator", place / "keeper"
    keepers.mkdir()
    policy = written(operators, "m", "rows.jsonl", privacy={
        "keeper": "../keeper/keeper.sock", "ledger": "../keeper/book", "delta": 1e-3})  # fmt: skip
    policy.write_text(f'directory = "../keeper"\n{policy.read_text()}')
    (operators / "node.key").write_text("secret")
    for path in (policy, operators / "node.key"):
        path.chmod(0o644)
    shutil.chown(keepers, KEEPER, KEEPER)
    for path in keepers.rglob("*"):
        shutil.chown(path, KEEPER, KEEPER)
    line = ["-m", "fedlora.cli", "node", "keeper", str(policy), "--user", str(NODE)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    serving = subprocess.Popen([*user(KEEPER), sys.executable, *line], env=environment)
    try:
        until = time.monotonic() + 120
        while not (keepers / "keeper.sock").exists() and time.monotonic() < until:
            assert serving.poll() is None, "it ended"
            time.sleep(0.2)
        time.sleep(0.5)
        assert as_user(NODE, policy) == {"charges": 1}
        assert "may ask nothing" in as_user(STRANGER, policy)["error"]
        assert {*as_user(STRANGER, policy)} == {"error"}, "nor write anything"
        assert as_user(NODE, policy) == {"charges": 2}
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait()
    gone = as_user(NODE, policy)
    assert {*gone} == {"error"}
    assert "fedlora node keeper node.toml" in gone["error"]
    read = Policy.load(policy)
    assert [x["what"] for x in audit.read(read.audit)] == ["left", "left"]
    assert len(Ledger(read.ledger).read().charges) == 2
