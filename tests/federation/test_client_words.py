"""What a client says of its scores, its privacy and itself: what is no number changes nothing."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord

from client_app.app import app as client_app
from fedlora.federation.server.client_words import MOST_SCORE, scores_of
from fedlora.federation.server.finish import spread
from fedlora.federation.server.loop import FederatedLora
from fedlora.reports.console import Silent
from fedlora.reports.report import write as write_report
from tests.federation.test_bad_clients import Bad, metric, tagged
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
LIAR = 1001
SCORED = {"evaluate.clients": True, "run.rounds": 1}
DP = {"privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3, "privacy.clip-norm": 1.0,
      "train.optimizer": "sgd"}  # fmt: skip


def lying(kind: str, *spoils: Any) -> Callable[[Message, Context], Message]:
    """One client changes its replies to messages of a kind."""

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == kind and context.node_id == LIAR:
            for spoil in spoils:
                reply = spoil(message, reply, Bad(spoil))
        return reply

    return app


def lines(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("accuracy", 1e308, False), ("accuracy", math.nan, False), ("accuracy", -0.1, False),
        ("accuracy", 1.0, True), ("macro_f1", 1.1, False), ("loss", math.inf, False),
        ("loss", -3.0, True), ("loss", 1e308, False), ("examples", -5, False),
        ("perplexity", MOST_SCORE, True), ("own", -7.0, True),
    ],
)  # fmt: skip
def test_a_score_is_a_number_that_a_model_can_have(name: str, value: float, kept: bool) -> None:
    found = scores_of({f"final.{name}": value, "final.mae": 1.0, "steps": 3}, "final.")
    assert found == ({name: value, "mae": 1.0} if kept else {"mae": 1.0})


def test_what_a_run_is_judged_by_is_not_for_one_client_to_say() -> None:
    honest = [{"loss": 2.0}, {"loss": 4.0}, {}]
    assert spread([*honest, {"loss": 3.0, "accuracy": 1.0}]) == {"loss": 3, "worst_tenth_loss": 4}
    assert spread([{"accuracy": 1.0}]) == {"accuracy": 1.0, "worst_tenth_accuracy": 1.0}


@pytest.mark.parametrize("value", [1e308, math.nan, -1.0])
def test_an_absurd_final_score_is_left_out_of_the_clients_mean(
    settings: Settings, value: float
) -> None:
    ran = federate(
        settings(**quick("fedavg", **SCORED)),
        lying("evaluate", metric("final.accuracy", value), metric("final.loss", value * 1e9)),
    )
    told = [line["final"] for line in lines(ran)]
    assert "accuracy" not in told[1]
    honest = [told[0]["accuracy"], told[2]["accuracy"]]
    assert ran.summary["clients"]["final"]["accuracy"] == pytest.approx(sum(honest) / 2)


@pytest.mark.parametrize("change", [{"round": 1}, {"client": 0}, {"token": "other"}])
def test_final_scores_of_another_round_client_or_run_do_not_count(
    settings: Settings, change: dict[str, Any]
) -> None:
    ran = federate(settings(**quick("fedavg", **SCORED)), lying("evaluate", tagged(**change)))
    assert [bool(line["final"]) for line in lines(ran)] == [True, False, True]


def test_a_loss_beyond_all_sense_is_one_that_is_no_number(settings: Settings) -> None:
    ran = federate(settings(**quick("fedavg")), Bad(metric("loss", 1e308)))
    assert ran.rounds[2]["accepted"] == [0, 1, 2]
    assert ran.rounds[2]["loss_not_finite"] == [1]


# -- what is sent once ----------------------------------------------------------------------------


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[tuple[int | None, str]] = []

    def client_failed(self, client: int | None, reason: str) -> None:
        self.said.append((client, reason))


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("fedsa", "query.collect", {"strategy.fedsa.average-at-end": True}),
        ("fedsb", "train.gradient", {"strategy.fedsb.init-from": "update-approx"}),
    ],
)
def test_no_client_answers_in_anothers_name_beside_the_rounds(
    settings: Settings, name: str, kind: str, change: dict[str, object]
) -> None:
    heard = Heard()

    def listen(server: FederatedLora) -> None:
        server.observer = heard

    given = settings(**quick(name, **change, **{"run.rounds": 1}))
    federate(given, lying(kind, tagged(client=0)), listen)
    assert heard.said
    for client, reason in heard.said:
        assert client == 1
        assert "the reply is client 0's" in reason


# -- privacy --------------------------------------------------------------------------------------


def without(*names: str) -> Any:
    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        told = reply.content.metric_records["metrics"]
        reply.content["metrics"] = MetricRecord({k: x for k, x in told.items() if k not in names})
        return reply

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [metric("privacy.epsilon", math.nan), without("privacy.epsilon", "privacy.sigma")],
    ids=["NaN", "missing"],
)
def test_a_client_that_does_not_tell_its_epsilon_costs_its_own_line(
    settings: Settings, spoil: Any
) -> None:
    """The run ends, and its report is written; what was not told is not made up."""
    ran = federate(settings(**quick("fedavg", **DP, **{"run.rounds": 1})), lying("train", spoil))
    told = ran.summary["privacy"]["epsilon"]
    assert told["1"] == "not told"
    assert told["0"] > 0
    write_report(ran.directory, False)


def test_no_client_has_a_say_in_the_epsilon_of_a_run_that_the_server_noises(
    settings: Settings,
) -> None:
    given = settings(**quick("fedavg", **{
        "privacy.level": "client", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3,
        "privacy.clip-norm": 1.0, "run.rounds": 1,
    }))  # fmt: skip
    honest = federate(given).summary["privacy"]["epsilon"]
    lies = [metric("privacy.epsilon", 1e-6), metric("privacy.sigma", 9.0), metric("privacy.q", 0.1)]
    ran = federate({**given, "run.name": "lied"}, lying("train", *lies))
    assert ran.summary["privacy"]["epsilon"] == honest


# -- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        without("seconds", "forward-seconds"),
        metric("backward-seconds", 1e308),
        metric("seconds", 1e308),
    ],
    ids=["missing", "backward 1e308", "seconds 1e308"],
)
def test_no_times_that_a_client_tells_stop_a_run_that_ranks_by_them(
    settings: Settings, spoil: Any
) -> None:
    """Nor is any longer than the server waited for the answer."""
    given = settings(**quick("fedex", **{"ranks.policy": "legend"}))
    seen: list[FederatedLora] = []
    ran = federate(given, lying("train", spoil), seen.append)
    assert [r["accepted"] for r in ran.rounds[1:]] == [[0, 1, 2]] * 2
    for member in seen[0].run.members.values():
        assert all(0 <= x < 60 for x in member.timing.values())
