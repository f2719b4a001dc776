"""Whatever dies, is late, comes twice or is cut off: the right rounds, and the right model."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch import Tensor

from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, RoundError
from fedlora.federation.server import exchange
from fedlora.federation.server.loop import FederatedLora
from fedlora.lora import tree_file
from tests.support.chaos import FAULTS, ChaosGrid, Clock, Strikes, endure, fault
from tests.support.long import few
from tests.support.tiny_federation import Ran, quick

Settings = Callable[..., dict[str, object]]
MOMENTS = ("before the checkpoint", "in the checkpoint", "after the checkpoint", "disk full")
OTHER = int(os.environ.get("FEDLORA_CHAOS_SEED", "0"))
"""Added to every schedule's seed: other faults, other rounds."""


def same_replies(chaotic: Ran) -> Callable[[int, int], str]:
    """Every reply that was accepted there arrives here, and no other."""
    accepted = {r["round"]: set(r["accepted"]) for r in chaotic.rounds}
    return lambda round, client: "" if client in accepted[round] else "killed"


@pytest.mark.parametrize(
    ("name", "rounds", "seed", "more"),
    [
        pytest.param("fedsa", 5, 3, {}, marks=pytest.mark.slow),
        pytest.param("fedex", 20, 1, {}, marks=pytest.mark.slow),  # a moving base
        pytest.param("fedsa", 20, 2, {}, marks=pytest.mark.slow),  # client memory
        # client memory of rounding errors
        pytest.param("fedavg", 20, 3, {"wire.dtype": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_chaos_ends_in_the_model_of_the_replies_that_arrived(
    settings: Settings, monkeypatch, name: str, rounds: int, seed: int, more: dict[str, object]
) -> None:
    given = settings(**quick(name, **{"run.rounds": rounds, "clients.count": 4, **more}))
    seed += OTHER
    chance = random.Random(seed)
    kills = {r: chance.choice(MOMENTS) for r in chance.sample(range(1, rounds + 1), rounds // 4)}

    def plan(round: int, client: int) -> str:
        return "" if client == round % 4 else fault(seed, round, client)  # one is always well

    with monkeypatch.context() as patch:
        strikes = Strikes(kills)
        strikes.install(patch)
        chaotic = endure({**given, "run.name": "chaos"}, plan, patch)
        assert strikes.done == set(kills), "the server was struck each time it was to be"
    with monkeypatch.context() as patch:
        calm = endure({**given, "run.name": "calm"}, same_replies(chaotic), patch)
    assert [r["round"] for r in chaotic.rounds] == list(range(rounds + 1)), (
        "each round once, in order"
    )
    for round in chaotic.rounds[1:]:
        well = {c for c in range(4) if plan(round["round"], c) in ("", "twice")}
        assert set(round["accepted"]) == well, "neither a wrong round nor a lost reply"
        refused = {f["client"] for f in round["failures"]}
        assert refused == set(range(4)) - well, "and each that is missing has its reason"
    played = {f for r in range(1, rounds + 1) for c in range(4) if (f := plan(r, c))}
    assert len(played) >= min(len(FAULTS) - 2, rounds // 2), "the schedule is a hard one"
    assert chaotic.adapter == calm.adapter


def run(given: dict[str, object], plan: Callable[[int, int], str], monkeypatch) -> Ran:
    with monkeypatch.context() as patch:
        return endure(given, plan, patch)


@pytest.mark.parametrize(
    "happens", few(["late", "twice", "replayed", "another's"], "late", "another's")
)
def test_a_reply_never_counts_in_another_round_than_its_own(
    settings: Settings, monkeypatch, happens: str
) -> None:
    given = settings(**quick("fedavg", **{"run.rounds": 3}))

    def plan(round: int, client: int) -> str:
        return happens if (round, client) == (2, 1) else ""

    chaotic = run({**given, "run.name": "a"}, plan, monkeypatch)
    assert [len(r["accepted"]) for r in chaotic.rounds] == [0, 3, 3 if happens == "twice" else 2, 3]
    calm = run({**given, "run.name": "b"}, same_replies(chaotic), monkeypatch)
    assert chaotic.adapter == calm.adapter


def test_a_slow_node_costs_its_reply_and_the_round_ends_at_the_deadline(
    settings: Settings, monkeypatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(exchange, "time", clock)
    given = settings(**quick("fedavg", **{"run.rounds": 1, "round.deadline": 7.0}))
    config = Config.read(given)

    def plan(_: int, client: int) -> str:
        return "late" if client == 0 else ""

    with ChaosGrid(client_app, 3, config.flat(), 1, plan=plan) as grid:
        FederatedLora(config).start(grid)
    assert 7.0 <= clock.now < 10.0
    found = Ran(Path(str(given["run.out"]), "run")).rounds[1]
    assert found["failures"][0]["reason"] == "no reply within 7 s"
    assert found["accepted"] == [1, 2]


def test_too_few_replies_stop_the_run_which_goes_on_when_they_are_back(
    settings: Settings, monkeypatch
) -> None:
    given = settings(**quick("fedavg", **{"run.rounds": 3, "round.min-replies": 2}))

    def gone(round: int, client: int) -> str:
        return "killed" if round == 2 and client > 0 else ""

    with pytest.raises(RoundError, match=r"round 2: 1 updates .* mend the cause and resume"):
        run(given, gone, monkeypatch)
    again = run({**given, "run.resume": True}, lambda *_: "", monkeypatch)
    calm = run({**given, "run.name": "calm"}, lambda *_: "", monkeypatch)
    assert again.adapter == calm.adapter


# -- the disk -----------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    settings: Settings, monkeypatch
) -> None:
    given = settings(**quick("fedex", **{"run.rounds": 3}))
    fsync, writes = os.fsync, []

    def full(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if "round-00002" in path and not writes:
            writes.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(tree_file.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*free some, then resume"):
            run(given, lambda *_: "", patch)
    directory = Path(str(given["run.out"]), "run", "checkpoint")
    assert [p.name for p in sorted(directory.iterdir())] == [
        "round-00000.safetensors",
        "round-00001.safetensors",
    ], "nothing half written is left"
    again = run({**given, "run.resume": True}, lambda *_: "", monkeypatch)
    calm = run({**given, "run.name": "calm"}, lambda *_: "", monkeypatch)
    assert again.adapter == calm.adapter


def test_a_client_whose_disk_is_full_says_so_and_the_round_goes_on(
    settings: Settings, monkeypatch
) -> None:
    given = settings(**quick("fedsa", **{"run.rounds": 2, "clients.count": 3}))
    save, full = tree_file.save_file, []

    def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "client-1" in str(path) and not full:
            full.append(path)
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    monkeypatch.setattr(tree_file, "save_file", write)
    config = Config.read(given)
    from fedlora.launch.simulate.grid import LocalGrid

    with LocalGrid(client_app, 3, config.flat(), 1) as grid:
        FederatedLora(config).start(grid)
    rounds = Ran(Path(str(given["run.out"]), "run")).rounds
    assert "No space left" in rounds[1]["failures"][0]["reason"]
    assert rounds[2]["accepted"] == [0, 1, 2]
