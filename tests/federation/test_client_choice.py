"""Whole federations in which each client chooses the ranks that it sends: LoRA-A2 as published."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.errors import StrategyError
from fedlora.reports.run_files import breaks_certificate, breaks_promise
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]


def sent(ran: Ran, round: int, client: int, column: str) -> dict[str, Any]:
    tensors, _ = ran.update(round, client)
    return {k.removesuffix(f".{column}"): x for k, x in tensors.items() if k.endswith(f".{column}")}


def test_a_run_is_exact_and_certified_and_a_narrow_client_sends_its_own_ranks_alone(
    settings: Settings,
) -> None:
    given = settings(**quick("lora-a2", **{"run.rounds": 3, "output.keep-updates": True}))
    ran = federate(given)
    for record in ran.rounds[1:]:
        assert not record["failures"]
        assert not breaks_promise(record["proof"])
        assert not breaks_certificate(record["certificate"], "exact")
    narrow, wide = (ran.rounds[1]["clients"][i]["bytes_up"] for i in ("0", "2"))
    assert narrow < wide
    moved = sent(ran, 1, 0, "B")  # of 0 at first, so what is not is what it sent
    ranks = sum(int((B.norm(dim=0) > 0).sum()) for B in moved.values())
    assert 0 < ranks <= 2 * len(moved)
    assert all(B.shape[1] == 5 for B in moved.values())


@pytest.mark.parametrize("choice", few(["server", "client"], "client"))
def test_a_resumed_run_ends_in_the_same_bits(choice: str, settings: Settings) -> None:
    change = {"strategy.lora-a2.choice": choice, "run.rounds": 4, "train.lr-schedule": "constant"}
    whole = federate(settings(**quick("lora-a2", **change, **{"run.name": "whole"})))
    given = settings(**quick("lora-a2", **{**change, "run.rounds": 2}))
    federate(given)
    again = federate({**given, "run.rounds": 4, "run.resume": True})
    assert again.adapter == whole.adapter


@pytest.mark.parametrize(
    "choice",
    [{"modules": [], "counts": [], "ranks": []}, {"modules": ["x"], "counts": [1], "ranks": [0]},
     {"modules": ["x"], "counts": [9], "ranks": [0]}, {"modules": "x"}, None],
)  # fmt: skip
def test_a_choice_that_is_none_of_the_clients_costs_its_reply_alone(
    choice: Any, settings: Settings
) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            del reply.content["chosen"]
            if choice is not None:
                reply.content["chosen"] = ConfigRecord(choice)
        return reply

    ran = federate(settings(**quick("lora-a2", **{"run.rounds": 1})), app)
    (failure,) = ran.rounds[1]["failures"]
    assert failure["client"] == 1
    assert ran.rounds[1]["accepted"] == [0, 2]


def test_secure_aggregation_is_refused(settings: Settings) -> None:
    on = {"secure.aggregation": True, "secure.colluding": 0, "clients.ranks": "3"}
    given = settings(**quick("lora-a2", **on))
    with pytest.raises(StrategyError, match=r"or the ranks it chose.*use ffa"):
        federate(given, unasked=True)


def test_the_server_would_see_a_rank_that_was_not_trained_by_its_client(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterexample: a client that sends its own ranks as if they were others."""
    from fedlora.federation.client import handlers

    real = handlers.pack_chosen

    def shifted(chosen: Any) -> ConfigRecord:
        return real({m: ((x + 1) % 5).sort().values for m, x in chosen.items()})

    monkeypatch.setattr(handlers, "pack_chosen", shifted)
    given = settings(**quick("lora-a2", **{"run.rounds": 1, "clients.ranks": "3,3,5"}))
    given |= {"proof.enforce": False} if "proof.enforce" in preflight.read(given).flat() else {}
    ran = federate(given)
    assert any(breaks_certificate(r["certificate"], "exact") for r in ran.rounds[1:])
