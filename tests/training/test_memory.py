"""What a client keeps: found again as the server left it, and never missed in silence."""

import shutil
from pathlib import Path

import pytest
import torch

from fedlora.errors import CheckpointError, ClientMemoryError, LostBaseError
from fedlora.federation.client.memory import ClientMemory
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.tree_file import save
from fedlora.strategies.base import Version
from fedlora.strategies.base_log import BaseLog


def kept(x: float) -> Factors:
    return Factors(B={"m": torch.full((2, 3), x)})


def value(factors: Factors) -> float:
    return float(factors.B["m"][0, 0])


def change(x: float, seed: int = 0) -> Pair:
    g = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(1, 13, generator=g), torch.randn(11, 1, generator=g), x)


def test_a_newcomer_has_kept_nothing(tmp_path: Path) -> None:
    assert not list(ClientMemory(tmp_path, 3, "run").recall(0).items())


def test_what_was_kept_is_recalled_by_another_process_of_the_client(tmp_path: Path) -> None:
    ClientMemory(tmp_path, 3, "run").remember(2, kept(0.5))
    assert value(ClientMemory(tmp_path, 3, "run").recall(2)) == 0.5


def test_after_a_lost_reply_the_round_before_it_is_recalled(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.remember(1, kept(1.0))
    assert value(memory.recall(1)) == 1.0
    memory.remember(2, kept(2.0))  # this reply never reaches the server
    assert value(memory.recall(1)) == 1.0  # so it says: build on round 1
    memory.remember(3, kept(3.0))
    assert value(memory.recall(3)) == 3.0


def test_a_round_done_again_replaces_what_it_left(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.remember(1, kept(1.0))
    memory.remember(1, kept(-1.0))
    assert value(memory.recall(1)) == -1.0


def test_the_directory_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    for round in range(1, 9):
        memory.remember(round, kept(round))
        memory.recall(round)
    assert len(list(tmp_path.rglob("round-*"))) <= 3


@pytest.mark.parametrize(("client", "token"), [(4, "run"), (3, "another run")])
def test_anothers_memory_is_not_taken_for_its_own(tmp_path: Path, client: int, token: str) -> None:
    ClientMemory(tmp_path, 3, "run").remember(2, kept(0.5))
    with pytest.raises(ClientMemoryError, match=f"client {client} has lost its memory of round 2"):
        ClientMemory(tmp_path, client, token).recall(2)


@pytest.mark.parametrize("whose", ["client-4", "an earlier round", "another run"])
def test_a_whole_file_in_anothers_place_is_no_memory(tmp_path: Path, whose: str) -> None:
    """A backup of the wrong client, an older copy: its digest is right, and it is not this one."""
    mine = ClientMemory(tmp_path, 3, "run")
    mine.remember(2, kept(0.5))
    other = {
        "client-4": ClientMemory(tmp_path, 4, "run"),
        "an earlier round": ClientMemory(tmp_path, 3, "run"),
        "another run": ClientMemory(tmp_path, 3, "another"),
    }[whose]
    number = 1 if whose == "an earlier round" else 2
    other.remember(number, kept(9.0))
    other.lose(number, kept(9.0))
    for kind in ("round", "lost"):
        wrong = other.own / f"{kind}-{number:05}.safetensors"
        shutil.copy(wrong, mine.own / f"{kind}-00002.safetensors")
    with pytest.raises(
        ClientMemoryError, match=r"lost its memory of round 2 .* is that of .*restor"
    ):
        mine.recall(2)
    with pytest.raises(CheckpointError, match=r"lost-00002.safetensors is that of"):
        mine.lost(2)


def test_memory_of_an_older_fedlora_does_not_say_whose_it_is_and_is_taken(tmp_path: Path) -> None:
    mine = ClientMemory(tmp_path, 3, "run")
    save(mine.own / "round-00002.safetensors", kept(0.5))
    assert value(mine.recall(2)) == 0.5


def test_another_base_change_in_its_place_is_asked_for_again(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.add_base([Version(n, {"m": change(n, n)}) for n in (1, 2)])
    shutil.copy(memory.base / "00001.safetensors", memory.base / "00002.safetensors")
    with pytest.raises(LostBaseError, match=r"lacks base change 2 of 2 .*holds base change 1"):
        memory.base_to(2)


def test_a_damaged_record_of_what_fits_into_memory_is_said(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.halve(8)
    assert memory.microbatch() == 8
    (memory.own / "microbatch.txt").write_bytes(b"\xff8")
    with pytest.raises(ClientMemoryError, match="damaged: restore it"):
        memory.microbatch()


def test_lost_and_damaged_memory_say_which_and_what_to_do(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    with pytest.raises(ClientMemoryError, match=r"round 2 .*no such file.*restore .*start the run"):
        memory.recall(2)
    memory.remember(2, kept(0.5))
    (path,) = tmp_path.rglob("round-*")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ClientMemoryError, match=r"round 2 .*damaged"):
        memory.recall(2)


def test_base_changes_come_back_in_order(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.add_base([Version(n, {"m": change(float(n))}) for n in (1, 2, 3)])
    assert [v.number for v in memory.base_to(3)] == [1, 2, 3]
    assert [v.number for v in memory.base_to(2)] == [1, 2]
    assert memory.base_to(0) == []


def test_a_snapshot_stands_for_all_before_it(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    snapshot = Version(5, {"m": torch.ones(11, 13)}, snapshot=True)
    memory.add_base([snapshot, Version(6, {"m": change(1.0)})])
    assert [(v.number, v.snapshot) for v in memory.base_to(6)] == [(5, True), (6, False)]
    with pytest.raises(LostBaseError, match="lacks base change 4 of 4"):
        memory.base_to(4)


def test_a_gap_in_the_base_changes_is_named(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3, "run")
    memory.add_base([Version(n, {"m": change(1.0)}) for n in (1, 3)])
    with pytest.raises(LostBaseError, match=r"client 3 lacks base change 2 of 3 .*send them again"):
        memory.base_to(3)


def test_a_log_that_snapshots_gives_one_who_was_away_the_sum_the_others_hold(
    tmp_path: Path,
) -> None:
    log = BaseLog()
    steady = ClientMemory(tmp_path / "steady", 0, "run")
    away = ClientMemory(tmp_path / "away", 1, "run")
    for n in range(1, 30):
        log = log.add({"m": change(1.0 / n, seed=n)})
        steady.add_base(log.since(n - 1))
        if n in (4, 5, 29):
            away.add_base(log.since({4: 0, 5: 4, 29: 5}[n]))
    assert any(v.snapshot for v in log.versions)

    def total(memory: ClientMemory) -> torch.Tensor:
        from fedlora.lora.lowrank import accumulate

        x = None
        for v in memory.base_to(29):
            x = accumulate(None if v.snapshot else x, v.delta["m"])
        assert x is not None
        return x

    assert torch.equal(total(steady), total(away))
