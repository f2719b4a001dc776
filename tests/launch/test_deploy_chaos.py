"""Everything dies once, in a seeded order, on real processes. Minutes, so marked slow.

FEDLORA_CHAOS_SEED=7 python -m pytest -s tests/launch/test_deploy_chaos.py
"""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedlora.launch.deploy import host
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.supervise import read_state
from fedlora.privacy.ledger import Ledger
from tests.federation.test_faults import same_replies
from tests.support.chaos import endure
from tests.support.deployment import (
    adapter,
    bring_up,
    experiment,
    mortal,
    prepared,
    ran,
    rounds,
    unruled,
)
from tests.support.relay import Relay
from tests.support.tiny_federation import Ran

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FEDLORA_CHAOS_SEED", "1"))
CLIENTS, DEADLINE = 3, 75.0
POINTS = ("half-a-checkpoint", "checkpoint-not-renamed", "checkpoint-kept", "half-a-line")
FAULTS = (
    "the SuperLink killed",
    "the ServerApp killed at its checkpoint",
    "a node killed",
    "a network cut",
    "a node too slow",
)


@dataclass
class Strike:
    """One fault: in which round, how long after the round began, at whom."""

    fault: str
    round: int
    after: float
    node: int
    lasts: float
    begun: float = 0.0
    done: float = 0.0


@dataclass
class Storm:
    """The schedule, and the hand that carries it out."""

    plan: Plan
    relays: list[Relay]
    strikes: list[Strike]
    healing: list[tuple[float, object]] = field(default_factory=list)

    @classmethod
    def seeded(cls, plan: Plan, relays: list[Relay], seed: int) -> "Storm":
        chance = random.Random(seed)
        order = chance.sample(FAULTS, len(FAULTS))
        strikes = [
            Strike(f, r, chance.uniform(0, 8), chance.randrange(CLIENTS), chance.uniform(10, 25))
            for r, f in enumerate(order, 2)
        ]
        for s in strikes:
            print(f"round {s.round}: {s.fault} (node {s.node}, after {s.after:.1f} s)")
            if "checkpoint" in s.fault:
                point = {"point": chance.choice(POINTS), "round": s.round}
                (plan.server / "killed.json").write_text(json.dumps(point))
                print(f"         {point['point']}")
        return cls(plan, relays, strikes)

    def __call__(self, results: Path) -> None:
        under_way, now = len(rounds(results)), time.monotonic()
        for until, heal in list(self.healing):
            if now >= until:
                self.healing.remove((until, heal))
                heal()  # type: ignore[operator]
        for s in self.strikes:
            if s.done or under_way < s.round:
                continue
            s.begun = s.begun or now
            if now - s.begun >= s.after:
                s.done = now
                print(f"now in round {under_way}: {s.fault} (node {s.node})")
                self._strike(s)

    def _strike(self, s: Strike) -> None:
        children = read_state(self.plan)["children"]

        def hit(name: str, with_signal: int) -> None:
            if pid := children[name]["pid"]:
                os.killpg(pid, with_signal)

        if s.fault == "the SuperLink killed":
            hit("superlink", signal.SIGKILL)
        elif s.fault == "a node killed":  # and its worker: the machine lost its power
            hit(f"worker-{s.node}", signal.SIGKILL)
            hit(f"node-{s.node}", signal.SIGKILL)
        elif s.fault == "a network cut":
            self.relays[s.node].cut()
            self.healing.append((s.done + s.lasts, self.relays[s.node].mend))
        elif s.fault == "a node too slow":
            pid = children[f"worker-{s.node}"]["pid"]
            os.killpg(pid, signal.SIGSTOP)

            def wake() -> None:
                with suppress(ProcessLookupError):  # the supervisor killed it
                    os.killpg(pid, signal.SIGCONT)

            self.healing.append((s.done + DEADLINE + 5, wake))

    def over(self) -> None:
        for _, heal in self.healing:
            heal()  # type: ignore[operator]


@pytest.fixture
def exposed(tiny, tmp_path: Path) -> Iterator[tuple[Plan, list[Relay]]]:
    """A deployment each of whose nodes reaches the server through a relay of its own.

    Without policies, since the bytes at the end are compared with a second run's.
    """
    from tests.conftest import tiny_settings

    given = tiny_settings(
        tiny,
        tmp_path,
        "float32",
        "bert",
        **{
            "strategy.name": "fedsa",  # clients keep memory
            "run.rounds": len(FAULTS) + 2,
            "run.name": "storm",
            "train.steps": 2,
            "evaluate.clients": False,
            "round.deadline": DEADLINE,
            "privacy.noise-multiplier": 1.0,
            "privacy.sample-rate": 0.25,
            "privacy.insecure-reproducible-noise": True,
        },
    )
    plan = prepared(tmp_path / "dep", given, CLIENTS)
    relays = [Relay(plan.port) for _ in range(CLIENTS)]
    for i, relay in enumerate(relays):
        with (plan.node(i) / "env.sh").open("a") as f:
            f.write(f"export FEDLORA_SUPERLINK=127.0.0.1:{relay.port}\n")
    mortal(plan)
    unruled(plan)
    bring_up(plan)
    yield plan, relays
    host.down(plan, print)
    for relay in relays:
        relay.close()


def test_a_storm_ends_in_the_model_of_the_replies_that_arrived(
    exposed, tmp_path: Path, monkeypatch
) -> None:
    plan, relays = exposed
    storm = Storm.seeded(plan, relays, SEED)
    status, starts = "", 0
    try:
        while status != "finished:completed":
            status, results = ran(plan, {"run.resume": starts > 0}, storm)
            starts += 1
            assert starts <= 4, "one kill, and perhaps a round without any reply"
    finally:
        storm.over()
    assert all(s.done for s in storm.strikes)
    assert not (plan.server / "killed.json").exists(), "the ServerApp was killed at its checkpoint"

    lines = rounds(results)
    assert [r["round"] for r in lines] == list(range(len(FAULTS) + 3))
    for line in lines[1:]:
        refused = {f["client"] for f in line["failures"]}
        assert refused == set(line["cohort"]) - set(line["accepted"]), "each has its reason"
    assert any(len(r["accepted"]) < CLIENTS for r in lines[1:]), "the storm cost something"
    assert lines[-1]["accepted"] == [0, 1, 2], "and all came back"

    given = {**experiment(plan), "run.out": str(tmp_path / "calm")}
    calm = endure(given, same_replies(Ran(results)), monkeypatch)
    assert adapter(results) == calm.adapter

    for i in range(CLIENTS):
        root = plan.node(i) / "memory"
        charged = Counter(c.round for c in Ledger(root).read().charges)
        arrived = [r["round"] for r in lines if i in r["accepted"]]
        assert set(arrived) <= set(charged), "whatever arrived is paid for"
