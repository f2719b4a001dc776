"""Whole federations in which each client chooses the ranks that it sends: LoRA-A2 as published, and
Ravan's heads by the gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, RoundError, StrategyError
from fedlora.federation.client import job
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.node_cli import refusals
from fedlora.lora.adapter import Factors
from fedlora.reports.run_files import breaks_certificate, breaks_promise
from fedlora.strategies.base import Round
from fedlora.strategies.ravan import Ravan
from fedlora.testing.federation import SQUARE, make_clients, make_start
from tests.federation.test_first_gradient import gradients
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, quick
from tests.support.under_policy import written

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


# -- Ravan's choice by gradient --------------------------------------------------------------------


def ravan(**changes: object) -> dict[str, object]:
    given = {"strategy.ravan.choice": "gradient", "output.keep-updates": True, **changes}
    return quick("ravan", **given)


def heads_of(ran: Ran, round: int, client: int) -> dict[str, Tensor]:
    """W's share of each head, s H_j (h, b, b) in float64, by module."""
    tensors, notes = ran.update(round, client)
    return {m: tensors[f"{m}.R"].double() * s for m, s in notes["scale"].items()}


def moved(now: Tensor, before: Tensor) -> set[int]:
    gap = (now - before).flatten(1).abs().amax(1)
    return {j for j, x in enumerate(gap) if float(x) > 1e-7}


@pytest.mark.parametrize("scales", ["none", "trained"])
def test_ravan_trains_the_heads_of_the_largest_gradient_and_no_others(
    scales: str, settings: Settings
) -> None:
    """Against dL/dH of autograd on the dense weights, one example at a time."""
    given = settings(**ravan(**{"strategy.ravan.head-scales": scales}))
    servers: list[FederatedLora] = []
    ran = federate(given, before=servers.append)
    state = servers[0].run.state
    for record in ran.rounds[1:]:
        assert not record["failures"]
        assert not breaks_promise(record["proof"])
        assert not breaks_certificate(record["certificate"], "exact")
        assert record["proof"]["norm"] > 0
    G, _ = gradients({**given, "strategy.ravan.choice": "random", "run.name": "slow"})
    zero, leading = torch.zeros(3, 4, 4, dtype=torch.float64), 0
    for i, count in enumerate((1, 2, 3)):
        sent = heads_of(ran, 1, i)
        for m in state.A:
            A, B = state.A[m].double(), state.B[m].double()
            sizes = [
                float((B[:, j : j + 4].T @ G[i][m] @ A[j : j + 4].T).norm()) for j in (0, 4, 8)
            ]
            want = {*sorted(range(3), key=lambda j: -sizes[j])[:count]}
            assert moved(sent[m], zero) == want
            leading += want == {*range(count)}
    assert leading < 3 * len(state.A), "else nothing was chosen"
    up = [ran.rounds[2]["clients"][str(i)]["bytes_up"] for i in range(3)]
    assert up[0] < up[1] < up[2]


@pytest.mark.parametrize("average", ["all", "trained"])
def test_a_head_is_the_mean_over_all_or_over_those_that_trained_it(
    average: str, settings: Settings
) -> None:
    """Of the updates on disk, in float64, round after round."""
    ran = federate(settings(**ravan(**{"strategy.ravan.average": average, "run.rounds": 3})))
    n = [ran.update(1, i)[1]["num_examples"] for i in range(3)]
    H = {m: torch.zeros_like(x) for m, x in heads_of(ran, 1, 2).items()}
    for round in (1, 2, 3):
        sent = [heads_of(ran, round, i) for i in range(3)]
        for m, before in H.items():
            trained = [moved(x[m], before) for x in sent]
            assert [len(x) for x in trained] == [1, 2, 3]
            after = before.clone()
            for j in range(3):
                by = [i for i in range(3) if j in trained[i]]
                total = sum(n[i] for i in (by if average == "trained" else range(3)))
                after[j] += sum(n[i] / total * (sent[i][m][j] - before[j]) for i in by)
            H[m] = after
        if round == 3:
            continue
        for m, want in H.items():  # what the next round's clients begin with in other heads
            kept = [j for j in range(3) if j not in moved(heads_of(ran, round + 1, 0)[m], want)]
            assert len(kept) == 2


def test_a_run_by_gradient_resumes_to_the_same_bits(settings: Settings) -> None:
    change = ravan(**{"run.rounds": 4, "train.lr-schedule": "constant"})
    whole = federate(settings(**change, **{"run.name": "whole"}))
    given = settings(**{**change, "run.rounds": 2})
    federate(given)
    again = federate({**given, "run.rounds": 4, "run.resume": True})
    assert again.adapter == whole.adapter


def test_heads_that_were_not_chosen_stay_under_weight_decay(settings: Settings) -> None:
    """While the client trains, too, and not only in what it sends."""
    seen: list[tuple[Tensor, Tensor, set[int]]] = []
    real = job.masked

    def looked(begun: Factors, trained: Factors, chosen: Any) -> Factors:
        for m, ranks in chosen.items():
            mine = {j // 4 for j in ranks.tolist()}
            seen.append((begun.R[m], trained.R[m], mine))
        return real(begun, trained, chosen)

    change = {"train.weight-decay": 0.1, "train.steps": 4, "strategy.ravan.head-scales": "trained"}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(job, "masked", looked)
        federate(settings(**ravan(**change, **{"run.rounds": 3})))
    others = 0
    for begun, trained, mine in seen:
        for j in {*range(len(begun) // 4)} - mine:
            rows = slice(4 * j, 4 * j + 4)
            assert torch.equal(begun[rows], trained[rows])
            others += bool(begun[rows].any())
    assert others > 6, "else there was nothing that could decay"


def test_a_module_that_no_gradient_reaches_has_heads_drawn(settings: Settings) -> None:
    """By pooling = "mean" nothing hangs on the pooler; the others train as ever."""
    change = {"model.pooling": "mean", "lora.target-modules": "query,value,pooler.dense"}
    ran = federate(settings(**ravan(**change)))
    assert not [f for r in ran.rounds for f in r["failures"]]
    assert ran.rounds[-1]["proof"]["norm"] > 0


@pytest.mark.parametrize("ranks", [[0, 1, 2, 4], [1, 2, 3, 4], [0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_ranks_that_are_no_whole_heads_of_the_clients_own_cost_its_reply(
    ranks: list[int], settings: Settings
) -> None:
    """The second module makes up for the number, which the first server's check counts over all."""

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            said = reply.content["chosen"]
            modules = said["modules"]
            assert isinstance(modules, list)
            first, second, *rest = modules
            total = 4 * len(modules) - len(ranks) - 4 * len(rest)
            given = [*ranks, *range(total), *(x for _ in rest for x in range(4))]
            counts = [len(ranks), total, *(4 for _ in rest)]
            reply.content["chosen"] = ConfigRecord(
                {"modules": [first, *([second] if total else []), *rest],
                 "counts": [c for c in counts if c], "ranks": given}
            )  # fmt: skip
        return reply

    ran = federate(settings(**ravan(**{"run.rounds": 1})), app)
    (failure,) = ran.rounds[1]["failures"]
    assert failure["client"] == 0
    assert "whole blocks" in failure["reason"]
    assert ran.rounds[1]["accepted"] == [1, 2]


def test_a_node_is_asked_for_the_runs_highest_rank_and_told_so_beforehand(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    """It is sent all heads, whatever its own rank."""
    config = Config.read(settings(**ravan(**{"data.path": "", "data.test-path": tiny["rows"]})))
    for most, fits in ((8, False), (12, True)):
        path = written(
            tmp_path / str(most), tiny["bert"], tiny["rows"],
            limits={"rank": most}, model={"allowed": {tiny["bert"]: {}}, "rank": 4},
        )  # fmt: skip
        assert (not any("rank" in x for x in refusals(Policy.load(path), config))) == fits


def test_heads_without_a_gradient_are_drawn_and_not_the_leading_ones() -> None:
    clients = make_clients([4, 8, 12], step=0)
    strategy = Ravan(choice="gradient")
    begun = strategy.start(
        strategy.download(strategy.init(make_start(clients)), clients[0], Round(1, 0)),
        Factors(), clients[0], Round(1, 0),
    )  # fmt: skip
    found = {
        tuple(strategy.choose(begun, begun, clients[0], Round(r, 0))[SQUARE].tolist())
        for r in range(1, 30)
    }
    assert found == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"privacy.level": "client", "privacy.noise-multiplier": 1.0}, "without noise"),
        ({"privacy.level": "example", "privacy.noise-multiplier": 1.0}, "without noise"),
        (
            {"secure.aggregation": True, "secure.colluding": 0, "clients.ranks": "8"},
            "the ranks it chose",
        ),
    ],
)
def test_a_choice_by_gradient_is_refused_where_nothing_may_leave_in_the_clear(
    change: dict[str, object], problem: str, settings: Settings
) -> None:
    given = settings(**ravan(**{**change, "output.keep-updates": False}))
    with pytest.raises(FedLoraError, match=problem):
        federate(given, unasked="secure.aggregation" in change)
    if "privacy.level" in change:  # the client says so itself, whatever its server does
        with pytest.raises(RoundError, match=rf"client 0: ConfigError: .*{problem}"):
            federate(given, unasked=True)
