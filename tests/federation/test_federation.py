"""Whole federations: every strategy on every kind of model, and what a run promises."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, StrategyError
from fedlora.federation.client.job import ClientJob
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import load
from fedlora.lora.adapter import Factors
from fedlora.reports.console import Silent
from fedlora.strategies import STRATEGIES
from fedlora.training import cache
from fedlora.training.model.loading import PREFIX
from fedlora.training.model.model import Model
from tests.support.long import few
from tests.support.tiny_federation import QUICK, Ran, federate, quick, ranks_for, read_tensors

Settings = Callable[..., dict[str, object]]
BOTH = pytest.mark.usefixtures("precision")
MODELS = ("bert", "gpt2", "llama")
PARTIAL = {"clients.count": 5, "clients.per-round": 3, "run.rounds": 3, "output.keep-updates": True}
NESTED = {"fedex", "ffa", "rolora"}
"""Exact strategies whose clients hold the leading ranks of one common A and B."""
CORES = {"fedsb"}


class AtFirst(Silent):
    """Keeps the factors that the run began with."""

    factors = Factors()

    def watch(self, server: FederatedLora) -> None:
        self.server, server.observer = server, self

    def round_done(self, record: Mapping[str, Any]) -> None:
        if record["round"] == 0:
            self.factors = self.server.setting.strategy.effective(self.server.run.state).factors


def dense_adapter(directory: Path) -> dict[str, np.ndarray]:
    """The change of each module (d, k) that an exported adapter of alpha = r makes."""
    x, _ = read_tensors(directory / "adapter_model.safetensors")
    names = {k.removesuffix(".lora_A.weight") for k in x if k.endswith(".lora_A.weight")}
    return {
        n.removeprefix(PREFIX): (
            x[f"{n}.lora_B.weight"].double() @ x[f"{n}.lora_A.weight"].double()
        ).numpy()
        for n in names
    }


def shares(ran: Ran, r: Mapping[str, Any]) -> list[tuple[float, dict[str, np.ndarray], Any]]:
    """(p_i, tensors, scale) of a round's updates, from its files alone."""
    found = [ran.update(r["round"], i) for i in r["accepted"]]
    total = sum(notes["num_examples"] for _, notes in found)
    return [
        (
            notes["num_examples"] / total,
            {k: t.double().numpy() for k, t in x.items()},
            notes["scale"],
        )
        for x, notes in found
    ]


def telescoped(ran: Ran, m: str) -> np.ndarray:
    """flora: W0 + sum over rounds of sum_i p_i s_i B_i A_i."""
    return sum(  # type: ignore[no-any-return, return-value]
        p * s[m] * x[f"{m}.B"] @ x[f"{m}.A"] for r in ran.rounds[1:] for p, x, s in shares(ran, r)
    )


def nested(ran: Ran, m: str, start: Factors) -> np.ndarray:
    """W + sum_i p_i (s B)_i A_i each round, what a client did not send taken from the mean."""
    A = start.A[m].double().numpy()
    sB = start.scale[m] * start.B[m].double().numpy()
    base = np.zeros((sB.shape[0], A.shape[1]))
    for r in ran.rounds[1:]:
        A_new, sB_new, target = 0 * A, 0 * sB, 0 * base
        for p, x, s in shares(ran, r):
            A_i, sB_i = A.copy(), sB.copy()
            if f"{m}.A" in x:
                A_i[: len(x[f"{m}.A"])] = x[f"{m}.A"]
            if f"{m}.B" in x:
                sB_i[:, : x[f"{m}.B"].shape[1]] = s[m] * x[f"{m}.B"]
            A_new, sB_new, target = A_new + p * A_i, sB_new + p * sB_i, target + p * sB_i @ A_i
        base = base + target - sB_new @ A_new
        A, sB = A_new, sB_new
    return base + sB @ A


def cores(ran: Ran, m: str, start: Factors) -> np.ndarray:
    """W0 + B Rbar A with A and B as they began."""
    A, B = start.A[m].double().numpy(), start.B[m].double().numpy()
    sR = start.scale[m] * start.R[m].double().numpy()
    for r in ran.rounds[1:]:
        new = 0 * sR
        for p, x, s in shares(ran, r):
            mine, n = sR.copy(), len(x[f"{m}.R"])
            mine[:n, :n] = s[m] * x[f"{m}.R"]
            new = new + p * mine
        sR = new
    return B @ sR @ A


GRID = [(p, kind, n) for n in STRATEGIES for p in ("float32", "bfloat16") for kind in MODELS]


@pytest.mark.parametrize(
    ("precision", "kind", "name"),
    few(
        GRID,
        *(("float32", "bert", name) for name in [*STRATEGIES][::2]),
        *(("float32", kind, name) for kind in MODELS[1:] for name in ("fedex", "flora")),
        *(("bfloat16", "bert", name) for name in ("fedavg", "fedex", "flora")),
    ),
    indirect=["precision"],
)
def test_every_strategy_runs_and_an_exact_one_ships_the_sum_of_its_updates(
    settings: Settings, precision: str, kind: str, name: str
) -> None:
    first = AtFirst()
    ran = federate(settings(kind, **quick(name, **PARTIAL)), before=first.watch)
    rounds = ran.rounds
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    assert not any(r["failures"] for r in rounds)
    assert all(len(r["accepted"]) == 3 for r in rounds[1:])
    for r in rounds[1:]:
        assert r["bytes"]["up"] == sum(c["bytes_up"] for c in r["clients"].values()) > 0
        assert r["bytes"]["down"] == sum(c["bytes_down"] for c in r["clients"].values()) > 0
    got = dense_adapter(ran.directory / "adapter")
    assert got
    for m in got:
        if name == "flora":
            want = telescoped(ran, m)
        elif name in NESTED:
            want = nested(ran, m, first.factors)
        elif name in CORES:
            want = cores(ran, m, first.factors)
        else:
            continue
        assert np.linalg.norm(want) > 0
        assert np.linalg.norm(got[m] - want) < 1e-4 * np.linalg.norm(want), m


def test_fedit_does_not_ship_the_sum_of_its_updates(settings: Settings) -> None:
    """The counterexample: the same check sees an average of factors for what it is."""
    changes = {**PARTIAL, "train.steps": 3, "clients.per-round": 0}
    first = AtFirst()
    ran = federate(settings(**quick("fedavg", **changes)), before=first.watch)
    got = dense_adapter(ran.directory / "adapter")
    gaps = [
        np.linalg.norm(got[m] - (want := nested(ran, m, first.factors))) / np.linalg.norm(want)
        for m in got
    ]
    assert max(gaps) > 1e-3


@pytest.mark.parametrize(
    ("name", "dtype"),
    few(
        [("fedex", "float32"), ("fedex", "bfloat16"), ("flora", "float32"), ("frlora", "float32")],
        ("fedex", "float32"),
        ("frlora", "float32"),
    ),
)
def test_a_client_that_was_away_has_the_same_base_bits_as_one_that_was_not(
    settings: Settings, tmp_path: Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client builds its base from what it was sent alone, and all have the server's.

    In one process they would share the server's base: here none is trusted from one message to
    the next, and each keeps its memory in a directory of its own.
    """
    seen: dict[int, set[bytes]] = {}
    folded = Model.folded

    def bits(model: Model) -> bytes:
        layers = (model.peft.get_submodule(PREFIX + m) for m in model.shapes)
        return b"".join(x.get_base_layer().weight.detach().numpy().tobytes() for x in layers)

    def noted(self: Model, fold: Any) -> Any:
        seen.setdefault(self.base._at[1], set()).add(bits(self))
        return folded(self, fold)

    monkeypatch.setattr(Model, "folded", noted)
    monkeypatch.setattr(ClientJob, "token", property(lambda d: f"{d.job.client}/{d.job.round}"))
    first = AtFirst()
    changes = {"clients.per-round": 2, "run.rounds": 12, "evaluate.clients": True}
    given = settings("gpt2", **quick(name, **{**PARTIAL, **changes, "wire.dtype": dtype}))
    nodes = {i: {"memory": str(tmp_path / f"node-{i}")} for i in range(5)}
    federate(given, before=first.watch, nodes=nodes)
    server = first.server
    effective = server.setting.strategy.effective(server.run.state)
    assert any(v.snapshot for v in effective.base)
    load(server.setting, server.session, server.run, server.run.state)
    assert seen[max(seen)] == {bits(server.setting.model)}  # the last evaluation asks everyone
    assert all(len(found) == 1 for found in seen.values())
    assert len(set().union(*seen.values())) >= len(seen) - 1  # and the base does move


@pytest.mark.parametrize(
    ("precision", "name"),
    few(
        [*(("float32", n) for n in ("fedex", "fedsa", "fslora", "ravan")), ("bfloat16", "fedex")],
        ("float32", "fedex"),
        ("bfloat16", "fedex"),
    ),
    indirect=["precision"],
)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    settings: Settings, precision: str, name: str
) -> None:
    def play(run: str, **changes: object) -> Ran:
        return federate(settings(**quick(name, **{**PARTIAL, **changes, "run.name": run})))

    one, two, other = play("one"), play("two"), play("other", **{"run.seed": 1})
    assert one.adapter == two.adapter
    assert one.metrics == two.metrics
    assert one.adapter != other.adapter


def test_ravans_heads_with_trained_scales_are_averaged_exactly(settings: Settings) -> None:
    """The certificate, which runs the model, holds; and the scales change what is trained."""
    plain = quick("ravan")
    ran = federate(settings(**plain))
    scaled = federate(settings(**plain, **{"strategy.ravan.head-scales": "trained",
                                           "run.name": "scaled"}))  # fmt: skip
    assert scaled.adapter != ran.adapter
    proofs = [r["proof"] for r in scaled.rounds if r.get("proof")]
    assert proofs
    assert all(p["deviation"] < 1e-5 for p in proofs)


@BOTH
def test_two_workers_give_the_bytes_of_one(settings: Settings) -> None:
    changes = {"evaluate.clients": True, "evaluate.every": 1, "clients.count": 4}
    given = quick("fedex", **changes)
    one = federate(settings(**given))
    two = federate(settings(**given, **{"run.name": "two", "simulate.workers": 2}))
    assert one.adapter == two.adapter
    assert one.metrics == two.metrics


def test_rank_one_alone_is_as_seeded_as_any(settings: Settings) -> None:
    """Rank 1 is what a fresh model is attached at: its first draw must not be what is used."""
    given = quick("fedavg", **{"clients.ranks": "1"})
    cache._model.key = None
    one = federate(settings(**given))
    cache._model.key = None
    torch.rand(7)
    two = federate(settings(**given, **{"run.name": "two"}))
    assert one.adapter == two.adapter


@BOTH
def test_one_client_alone_is_local_training(settings: Settings) -> None:
    ran = federate(settings(**quick("fedex", **{"clients.count": 1, "output.keep-updates": True})))
    x, notes = ran.update(2, 0)
    for m, got in dense_adapter(ran.directory / "adapter").items():
        want = notes["scale"][m] * x[f"{m}.B"].double() @ x[f"{m}.A"].double()
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-6)


def test_bytes_are_those_of_the_tensors_and_a_little_more(settings: Settings) -> None:
    ran = federate(settings(**quick("fedex", **{"output.keep-updates": True})))
    for r in ran.rounds[1:]:
        for i, found in r["clients"].items():
            x, _ = ran.update(r["round"], int(i))
            numbers = 4 * sum(t.numel() for t in x.values())
            assert numbers < found["bytes_up"] < 1.8 * numbers + 2000


def test_bfloat16_on_the_wire_halves_the_bytes_and_stays_within_its_own_rounding(
    settings: Settings,
) -> None:
    given = quick("fedex", **{"clients.count": 5, "clients.per-round": 3, "run.rounds": 4})
    full = federate(settings(**given))
    half = federate(settings(**given, **{"run.name": "half", "wire.dtype": "bfloat16"}))
    for a, b in zip(full.rounds[1:], half.rounds[1:], strict=True):
        assert b["bytes"]["up"] < 0.75 * a["bytes"]["up"]
        assert b["proof"]["deviation"] < b["proof"]["bound"]


def test_a_strategy_that_cannot_do_it_refuses_before_round_1(settings: Settings) -> None:
    given = quick("fedavg", **{"clients.ranks": "2,3"})
    with pytest.raises(StrategyError, match=r"needs one rank for all.*use fedex"):
        federate(settings(**given), unasked=True)


def test_a_run_of_the_same_name_is_not_written_over(settings: Settings) -> None:
    given = settings(**quick("fedex"))
    ran = federate(given)
    before = ran.adapter
    with pytest.raises(CheckpointError, match="holds a run already"):
        federate(given)
    assert ran.adapter == before


def test_the_final_model_in_memory_is_the_one_in_the_directory(settings: Settings) -> None:
    first = AtFirst()
    federate(settings("gpt2", **QUICK, **{"clients.ranks": ranks_for("fedex")}), before=first.watch)
    server = first.server
    fresh = Model(Config.read(settings("gpt2")), server.setting.labels).weights()
    shipped = dense_adapter(server.setting.journal.directory / "adapter")
    for m, delta in shipped.items():
        module = server.setting.model.peft.get_submodule(PREFIX + m)
        k = delta.shape[1]
        x = torch.eye(k)[None]
        with torch.no_grad():
            out = module(x)[0] - (module.get_base_layer().bias if m.count("c_") else 0.0)
        want = fresh[m].double().numpy() + delta
        np.testing.assert_allclose(out.T.double().numpy(), want, rtol=0, atol=1e-5)
