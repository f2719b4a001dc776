"""The certificate: what it measures is the model, and what the proof cannot see stops the run."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ProofError
from fedlora.federation.client import handlers, job, witness
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.secure.vector import decode
from fedlora.federation.server import certifier, secure_rounds
from fedlora.federation.wire.certificate import is_change
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.lowrank import extend, wide
from fedlora.strategies import STRATEGIES, fedex, fedsb, forms, lora_a2, ravan
from fedlora.strategies.base import Client, Round, Upload, Version
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.ffa import FFA
from fedlora.strategies.lora_a2 import LoRAA2
from fedlora.training import cache, certificate, devices
from fedlora.training.certificate import (
    K,
    Size,
    Witness,
    measure,
    measure_as,
    measure_shared,
    round_gaps,
    signs,
    start_gaps,
)
from fedlora.training.model import expert
from fedlora.training.model.in_float64 import in_float64
from fedlora.training.model.model import Model
from tests.support.long import few
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]
Patch = pytest.MonkeyPatch


def uneven(settings: Settings, name: str, **changes: object) -> dict[str, object]:
    """Unequal n_i and ranks, and with them alpha / r; a module that is not square."""
    given: dict[str, object] = {
        "train.steps": 3,
        "run.rounds": 3,
        "clients.count": 5,
        "data.partition": "dirichlet",
        "data.alpha": 0.5,
        "lora.target-modules": "query,intermediate.dense",
    }
    return settings(**{**quick(name), **given, **changes})


# -- nine faults that the proof's own helpers share ------------------------------------------------


def fedex_scale(patch: Patch) -> None:
    def completed(upload: Upload, whole: Mapping[str, Pair]) -> Mapping[str, Pair]:
        pairs = upload.sent.adapter().items()
        return {m: extend(replace(p, scale=whole[m].scale), whole[m]) for m, p in pairs}

    patch.setattr(fedex, "completed", completed)


def fedsb_scale(patch: Patch) -> None:
    def core(state: Factors, upload: Upload, m: str) -> Tensor:
        R, whole = upload.sent.R[m], wide(state.R[m]).clone()
        whole[: R.shape[0], : R.shape[1]] = wide(R)
        return whole

    patch.setattr(fedsb, "core", core)


def ravan_scale(patch: Patch) -> None:
    def completed(self: Any, state: Factors, upload: Upload, round: Round, m: str) -> Tensor:
        whole = wide(state.R[m]).clone()
        whole[self.chosen(state, upload.client, round, m)] = wide(upload.sent.R[m])
        return whole

    patch.setattr(ravan.Ravan, "completed", completed)


def on_clients(patch: Patch, planted: Callable[[Any], Any]) -> None:
    """The clients' strategy alone is another."""
    real = job.ClientJob.open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, *args: Any) -> Any:
        desk = real(cls, *args)
        return dataclasses.replace(desk, strategy=planted(desk.strategy))

    patch.setattr(job.ClientJob, "open", classmethod(opened))


class AtTheServersScale(FFA):
    def start(self, download: Any, kept: Any, client: Any, round: Any) -> Factors:
        found = super().start(download, kept, client, round)
        return replace(found, scale=dict.fromkeys(found.scale, 16.0 / 5))


def ffa_scale(patch: Patch) -> None:
    on_clients(patch, lambda _: AtTheServersScale())


def other_ranks(patch: Patch) -> None:
    """LoRA-A2 sends some ranks, and writes what comes back to others."""
    real, download = lora_a2.selection, LoRAA2.download

    def shifted(state: Any, *args: Any) -> Tensor:
        r = state.factors.A[args[-1]].shape[0]
        return ((real(state, *args) + 1) % r).sort().values

    def planted(self: LoRAA2, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(lora_a2, "selection", shifted)
            return download(self, *args)

    patch.setattr(LoRAA2, "download", planted)


def each_its_own_base(patch: Patch) -> None:
    """As on machines of their own: within one process clients continue from the server's base."""
    real = job.ClientJob.token.fget  # type: ignore[attr-defined]
    patch.setattr(job.ClientJob, "token", property(lambda d: f"{real(d)}/{d.job.client}"))


def newest_change_only(patch: Patch) -> None:
    each_its_own_base(patch)
    real = ClientMemory.base_to

    def base_to(self: ClientMemory, number: int) -> list[Version]:
        return [replace(v, snapshot=True) for v in real(self, number)[-1:]]

    patch.setattr(ClientMemory, "base_to", base_to)


def newest_residual_only(patch: Patch) -> None:
    """A late joiner lacks all residuals, and is sent the last."""
    each_its_own_base(patch)
    real = BaseLog.since

    def since(self: BaseLog, version: int) -> tuple[Version, ...]:
        found = real(self, version)
        return found if version else tuple(replace(v, snapshot=True) for v in found[-1:])

    patch.setattr(BaseLog, "since", since)


def head_not_averaged(patch: Patch) -> None:
    patch.setattr(fedex, "mean_other", lambda uploads, before: before)


def head_of_one_client(patch: Patch) -> None:
    real = fedex.mean_other
    patch.setattr(fedex, "mean_other", lambda uploads, before: real(uploads[:1], before))


FAULTS: dict[str, tuple[Callable[[Patch], None], str, dict[str, object], int]] = {
    "scale not folded, fedex": (fedex_scale, "fedex", {}, 1),
    "scale not folded, fedsb": (fedsb_scale, "fedsb", {}, 1),
    "scale not folded, ravan": (ravan_scale, "ravan", {}, 1),
    "the server's alpha / r, ffa": (ffa_scale, "ffa", {}, 1),
    "other ranks, lora-a2": (other_ranks, "lora-a2", {"strategy.lora-a2.choice": "server"}, 1),
    "newest base change only, fedex": (newest_change_only, "fedex", {}, 3),
    "newest residual only, fedex": (newest_residual_only, "fedex",
                                    {"clients.per-round": 2, "run.rounds": 5}, 3),
    "head not averaged": (head_not_averaged, "fedex", {}, 1),
    "head of one client": (head_of_one_client, "fedex", {}, 1),
}  # fmt: skip


@pytest.mark.parametrize("what", few(FAULTS, *[*FAULTS][::3]))
def test_a_fault_that_the_proof_shares_stops_the_run_in_the_round_it_acts_in(
    settings: Settings, what: str, monkeypatch: Patch, precision: str
) -> None:
    plant, name, changes, first = FAULTS[what]
    given = uneven(settings, name, **changes)
    federate({**given, "run.name": "clean"})
    plant(monkeypatch)
    with pytest.raises(ProofError, match="certificate") as caught:
        federate(given)
    stopped = int(str(caught.value).removeprefix("round ").split(":")[0])
    assert stopped == first
    assert [r["round"] for r in Ran(directory_of(given)).rounds] == list(range(first))


# -- what is measured -----------------------------------------------------------------------------


def prepared(settings: Settings, kind: str = "bert", **changes: object) -> Model:
    """A model with factors that are not zero, and a fold in its base."""
    config = Config.read(settings(kind, **changes))
    model = Model(config, cache.corpus(config).labels)
    ranks = dict.fromkeys(model.shapes, 3) if not model.rank else dict.fromkeys(model.shapes, 1)
    model.load(model.init_factors(Client(0, model.layers(ranks)), 0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ps in model.live().values():
            for p in ps.values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def by_definition(W: Tensor, m: str, key: str = "k") -> Tensor:
    """u_j^T W x_j, one at a time."""
    u, x = signs(f"{key}/{m}/u", K, W.shape[0]), signs(f"{key}/{m}/x", K, W.shape[1])
    return torch.stack([u[j] @ W @ x[j] for j in range(K)])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_modules_numbers_are_those_of_its_whole_weight(settings: Settings, kind: str) -> None:
    model = prepared(settings, kind)
    whole, factors = model.weights(), model.read()
    found = measure(model, "k", model.shapes, [])
    for m, W in whole.items():
        change = factors.scale[m] * factors.B[m].double() @ factors.A[m].double()
        torch.testing.assert_close(found[m], by_definition(W.double() + change, m))


def test_another_tensors_numbers_are_its_own(settings: Settings) -> None:
    model = prepared(settings)
    head = model.live()["other"]
    found = measure(model, "k", [], head)
    for name, p in head.items():
        T = p.detach().double()
        torch.testing.assert_close(found[name], by_definition(T if T.ndim > 1 else T[None], name))


def test_what_lies_beside_the_base_and_what_is_folded_counts(settings: Settings) -> None:
    for merge in ("into-base", "keep-as-adapter"):
        model = prepared(settings, **{"model.merge": merge})
        m = next(iter(model.shapes))
        d, k = model.shapes[m].d, model.shapes[m].k
        g = torch.Generator().manual_seed(1)
        pair = Pair(torch.randn(2, k, generator=g), torch.randn(d, 2, generator=g), 0.5)
        before = measure(model, "k", [m], [])[m]
        with model.folded({m: pair}):
            after = measure(model, "k", [m], [])[m]
        want = by_definition(pair.delta().double(), m)
        torch.testing.assert_close(after - before, want, rtol=1e-5, atol=1e-5)


FORMS = ("dora", "vera", "loha", "lokr", "hira", "fourierft", "ia3", "oft", "road", "delora", "c3a")


@pytest.mark.parametrize("form", FORMS)
def test_a_forms_numbers_are_those_of_its_effective_weight(settings: Settings, form: str) -> None:
    ranks = {"lora.form": form, "strategy.name": "fedavg", "clients.ranks": "4"}
    if form == "ia3":
        ranks["clients.ranks"] = "4,8,16"
    model = prepared(settings, **ranks)
    found = measure(model, "k", model.shapes, [])
    for m, shape in model.shapes.items():
        eye = torch.eye(shape.k, dtype=torch.float64)
        layer = in_float64(model.adapted[m], shape)
        with torch.no_grad():
            W = (layer(eye) - layer(torch.zeros_like(eye))).T
        torch.testing.assert_close(found[m], by_definition(W, m))


SHARED = tuple(form for form, x in forms.FORMS.items() if not forms.problem(x, FedSA()))


@pytest.mark.parametrize("form", SHARED)
def test_the_numbers_of_a_shared_side_are_those_of_that_side(settings: Settings, form: str) -> None:
    given = {"lora.form": form, "strategy.name": "fedsa", "clients.ranks": "3"}
    given |= {"lora.options": "width=8"} if form in ("nora", "lora-mini") else {}
    if form == "alora":
        given |= {"model.task": "causal-lm", "lora.invocation": "x"}
    config = Config.read(settings("llama" if form == "alora" else "bert", **given))
    model = Model(config, cache.corpus(config).labels)
    model.load(model.init_factors(Client(0, model.layers(dict.fromkeys(model.shapes, 3))), 0))
    found = measure_shared(model, "k", (3,))
    assert {name.partition("[")[0] for name in found} == {*model.shapes}
    for m in model.held():
        A = model.sides(m)[0].detach().double()
        rows = 1 if A.ndim == 1 else len(A)
        v = signs(f"k/{m}/v", K, A.shape[-1] if A.ndim == 1 else rows)
        want = v @ A if A.ndim == 1 else (v * (signs(f"k/{m}/x", K, A.shape[1]) @ A.T)).sum(1)
        blocks = [x for name, x in found.items() if name.startswith(f"{m}[")]
        torch.testing.assert_close(torch.stack(blocks).sum(0), want)


def test_a_module_that_is_not_linear_in_its_input_has_no_numbers(
    settings: Settings, monkeypatch: Patch
) -> None:
    model = prepared(settings)
    m = next(iter(model.shapes))
    layer = model.adapted[m]
    real = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *a, **k: real(x, *a, **k).tanh())
    found = measure(model, "k", model.shapes, [])
    assert found[m].isnan().all()
    assert all(found[n].isfinite().all() for n in found if n != m)


def test_measuring_changes_nothing(settings: Settings) -> None:
    model = prepared(settings)
    before = {n: p.clone() for n, p in model.peft.named_parameters()}
    chance = torch.get_rng_state()
    measure(model, "k", model.shapes, model.live()["other"])
    assert all(torch.equal(p, before[n]) for n, p in model.peft.named_parameters())
    assert torch.equal(torch.get_rng_state(), chance)


def test_signs_are_bits_of_a_hash_equal_everywhere() -> None:
    import hashlib

    found = signs("a key", 3, 5)
    digest = hashlib.shake_256(b"a key").digest(2)
    bits = [(byte >> (7 - i)) & 1 for byte in digest for i in range(8)][:15]
    assert found.flatten().tolist() == [2.0 * b - 1 for b in bits]
    assert found.dtype == torch.float64
    assert not torch.equal(signs("another", 3, 5), found)


def test_it_imports_nothing_of_what_it_checks() -> None:
    import ast
    from pathlib import Path

    tree = ast.parse(Path(certificate.__file__).read_text())
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fedlora")
    }
    near = "fedlora.training"
    known = {"devices", "model.expert", "model.model", "model.quantized"}  # what reads a weight
    assert ours == {f"{near}.{name}" for name in known}
    for module in (expert, devices):
        own = Path(module.__file__).read_text()
        assert "fedlora.lora" not in own, "it reads and moves without the algebra of pairs"
        assert "fedlora.strategies" not in own


# -- what is found --------------------------------------------------------------------------------


def one_module(d: int = 96, k: int = 64, r: int = 4) -> tuple[Tensor, Tensor]:
    """W0 as a model has it, and a round's change of rank r."""
    g = torch.Generator().manual_seed(3)
    W = 0.05 * torch.randn(d, k, generator=g, dtype=torch.float64)
    D = torch.randn(d, r, generator=g).double() @ torch.randn(r, k, generator=g).double()
    return W, 0.01 * D


def test_a_fault_of_one_percent_of_the_change_is_found_999_times_in_1000() -> None:
    W, change = one_module()
    missed = 0
    for n in range(3000):
        key = f"draw {n}"
        c = {"m": by_definition(W, "m", key)}
        moved = {"m": by_definition(W + change, "m", key)}
        wrong = {"m": by_definition(W + 0.99 * change, "m", key)}
        size = {"m": Size(float(W.norm()), 4 * float(change.norm()))}
        gap = round_gaps(
            c, wrong, (size, size), [Witness(3.0, c, moved)], {"m": 4}, "float32", "float32"
        )
        missed += gap["m"].excess <= 1
        right = round_gaps(
            c, moved, (size, size), [Witness(3.0, c, moved)], {"m": 4}, "float32", "float32"
        )
        assert right["m"].excess < 1
    assert missed == 0


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_of_ten_times_the_bound_is_found(wire: str, dtype: str) -> None:
    W, change = one_module()
    size = {"m": Size(float(W.norm()), 4 * float(change.norm()))}
    c = {"m": by_definition(W, "m")}
    clean = start_gaps(c, size, c, wire, dtype)["m"]
    fault = torch.randn(W.shape, generator=torch.Generator().manual_seed(9)).double()
    fault *= 10 * clean.bound / fault.norm()
    begun = {"m": by_definition(W + fault, "m")}
    assert start_gaps(c, size, begun, wire, dtype)["m"].excess > 1
    moved = {"m": by_definition(W + change, "m")}
    seen = [Witness(1.0, c, moved)]
    bound = round_gaps(c, moved, (size, size), seen, {"m": 4}, wire, dtype)["m"].bound
    fault *= 10 * bound / fault.norm()
    after = {"m": by_definition(W + change + fault, "m")}
    assert round_gaps(c, after, (size, size), seen, {"m": 4}, wire, dtype)["m"].excess > 1


def test_a_mean_of_unequal_clients_of_whom_one_lacks_a_module() -> None:
    g = torch.Generator().manual_seed(0)
    zero = torch.zeros(K).double()
    x, y = (torch.randn(K, generator=g).double() for _ in range(2))
    size = {"m": Size(1.0, 1.0), "n": Size(1.0, 1.0)}
    seen = [
        Witness(3.0, {"m": zero, "n": zero}, {"m": x, "n": x}),
        Witness(1.0, {"n": zero}, {"n": y}),
    ]
    before = {"m": zero, "n": zero}
    right = {"m": x, "n": 0.75 * x + 0.25 * y}
    args = ((size, size), seen, {}, "float32", "float32")
    assert all(g.excess < 1 for g in round_gaps(before, right, *args).values())
    assert round_gaps(before, {**right, "n": (x + y) / 2}, *args)["n"].excess > 1
    assert round_gaps(before, {**right, "m": 0.75 * x}, *args)["m"].excess > 1


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wire"),
    few(
        [(n, wire) for n, s in STRATEGIES.items() if s().promise != "approximate"
         for wire in ("float32", "bfloat16", "int8")],
        *(("fedex", wire) for wire in ("float32", "bfloat16", "int8")),
        ("flora", "float32"),
    ),
)  # fmt: skip
def test_clean_runs_stay_well_below_the_bound(settings: Settings, name: str, wire: str) -> None:
    changes = {"clients.per-round": 4, "run.rounds": 4, "wire.dtype": wire}
    for r in federate(uneven(settings, name, **changes)).rounds[1:]:
        found = r["certificate"]
        assert not found["not_certified"]
        assert found["excess"] < 0.5
        assert found["start_excess"] < 0.5
        assert wire != "float32" or found["deviation"] < 1e-5


OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "trimmed": ({"robust.method": "trimmed"}, ""),
    "afa": ({"robust.method": "afa"}, ""),
    "median": ({"robust.method": "median"}, ""),
    "norm-bound": ({"robust.method": "norm-bound", "robust.bound": 1e-3}, "norm-bound"),
    "server optimiser": ({"server.optimizer": "fedavgm", "strategy.name": "ffa"}, ""),
    "buffered": ({"round.buffer": 2, "strategy.name": "fedsb", "run.rounds": 5,
                  "devices.classes": "fast:1:100,slow:0.1:5"}, ""),
    "example-level privacy": ({"privacy.epsilon": 8.0, "privacy.delta": 1e-3}, ""),
    "client-level privacy": ({"privacy.epsilon": 8.0, "privacy.delta": 1e-3,
                              "privacy.level": "client", "strategy.name": "ffa",
                              "clients.ranks": "3"}, "client-level privacy"),
    "legend": ({"ranks.policy": "legend", "strategy.name": "fedex"}, ""),
}  # fmt: skip


@pytest.mark.parametrize(
    "what",
    few(OPTIONS, "trimmed", "buffered", "client-level privacy"),
)
def test_what_goes_around_an_aggregation_is_certified_or_named(
    settings: Settings, what: str
) -> None:
    changes, silent = OPTIONS[what]
    name = str(changes.get("strategy.name", "fedex"))
    for r in federate(uneven(settings, name, **changes)).rounds[1:]:
        found = r["certificate"]
        said = found["not_certified"]
        assert [silent in x for x in said] == ([True] if silent else [])
        assert found["start_excess"] < 0.5
        if silent:
            assert not found["layers"]
            assert not found["heard"]
        else:
            assert found["excess"] < 0.5
            assert found["deviation"] < 1e-4


def test_numbers_that_are_none_cost_their_client_its_update(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.client import witness

    real, turn = witness.numbers, iter([0] * 2 + [1] * 2 + [0] * 100)

    def numbers(*args: Any) -> Any:
        found = real(*args)
        return {n: x * float("nan") for n, x in found.items()} if next(turn) else found

    monkeypatch.setattr(witness, "numbers", numbers)
    ran = federate(uneven(settings, "fedex", **{"run.rounds": 1}))
    (failed,) = ran.rounds[1]["failures"]
    assert failed["client"] == 1
    assert failed["kind"] == "bad"
    assert "certificate" in failed["reason"]


def test_a_server_that_asks_for_a_private_part_is_refused(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.server import certification, run

    for module in (certification, run):
        monkeypatch.setattr(module, "cuts", lambda *_: ())
    from fedlora.errors import RoundError

    with pytest.raises(RoundError, match="a part that stays on this client"):
        federate(uneven(settings, "fedsa"))


# -- what is written ------------------------------------------------------------------------------


def one_percent_off(patch: Patch) -> None:
    from fedlora.training.model import peft_directory

    real = peft_directory.total

    def total(effective: Any) -> Any:
        found = dict(real(effective))
        m = next(iter(found))
        return {**found, m: replace(found[m], scale=1.01 * found[m].scale)}

    patch.setattr(peft_directory, "total", total)


def an_old_head(patch: Patch) -> None:
    from fedlora.federation.server import finish

    real = finish.save_peft

    def save(model: Model, effective: Any, *args: Any) -> Any:
        other = {n: x + 1e-3 for n, x in effective.factors.other.items()}
        return real(
            model, replace(effective, factors=replace(effective.factors, other=other)), *args
        )

    patch.setattr(finish, "save_peft", save)


@pytest.mark.parametrize("pooling", ["default", pytest.param("mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plant", [one_percent_off, an_old_head])
def test_an_adapter_that_is_not_the_model_is_not_passed_off_as_it(
    settings: Settings, monkeypatch: Patch, plant: Callable[[Patch], None], pooling: str
) -> None:
    from fedlora.errors import ModelError

    given = uneven(settings, "fedex", **{"model.pooling": pooling, "run.rounds": 2})
    assert 0 <= federate({**given, "run.name": "clean"}).summary["export_excess"] < 0.5
    plant(monkeypatch)
    with pytest.raises(ModelError, match="is not the federated model's"):
        federate(given)


# -- who says other numbers than its update has ----------------------------------------------------

PLAIN = [n for n, s in STRATEGIES.items() if n != "fedsa"]


@pytest.mark.parametrize(
    ("name", "wire"),
    few(
        [(n, wire) for n in PLAIN for wire in ("float32", "int8")],
        *((name, "float32") for name in ("fedavg", "ravan")),
        ("fedex", "int8"),
    ),
)
def test_a_client_whose_numbers_are_not_its_updates_is_left_out_by_name(
    settings: Settings, monkeypatch: Patch, name: str, wire: str
) -> None:
    from fedlora.federation.client import witness
    from fedlora.launch.simulate.grid import LocalGrid

    real = witness.numbers
    turns = dict.fromkeys(range(5), 0)

    def numbers(*args: Any) -> Any:
        i = args[4].client
        turns[i] += 1
        found = real(*args)
        lies = i == 1 and turns[i] == 4  # at the end of its second round
        return {n: x + 9.0 for n, x in found.items()} if lies else found

    monkeypatch.setattr(witness, "numbers", numbers)
    monkeypatch.setattr(LocalGrid, "simulated", False)
    ran = federate(uneven(settings, name, **{"wire.dtype": wire, "data.partition": "iid"}))
    failed = [(f["round"], f["client"], f["kind"]) for r in ran.rounds for f in r["failures"]]
    assert failed == [(2, 1, "bad")]
    assert 1 not in ran.rounds[2]["accepted"]
    assert 1 in ran.rounds[3]["accepted"]


def test_a_client_that_says_it_began_elsewhere_does_not_stop_a_deployment(
    settings: Settings, monkeypatch: Patch
) -> None:
    from fedlora.federation.client import witness
    from fedlora.launch.simulate.grid import LocalGrid

    real = witness.numbers

    def numbers(*args: Any) -> Any:
        found = real(*args)
        lies = args[4].client == 3 and args[4].round == 2  # alike at start and end
        return {n: x + 9.0 for n, x in found.items()} if lies else found

    monkeypatch.setattr(witness, "numbers", numbers)
    monkeypatch.setattr(LocalGrid, "simulated", False)
    ran = federate(uneven(settings, "fedex", **{"data.partition": "iid"}))
    assert [(f["round"], f["client"]) for r in ran.rounds for f in r["failures"]] == [(2, 3)]
    assert "did not begin" in ran.rounds[2]["failures"][0]["reason"]
    monkeypatch.setattr(LocalGrid, "simulated", True)
    with pytest.raises(ProofError, match="client 3 did not begin"):
        federate(uneven(settings, "fedex", **{"data.partition": "iid", "run.name": "here"}))


@pytest.mark.parametrize("what", ["scale not folded, fedex", "the server's alpha / r, ffa"])
def test_software_that_is_wrong_is_not_taken_for_liars(
    settings: Settings, what: str, monkeypatch: Patch
) -> None:
    from fedlora.launch.simulate.grid import LocalGrid

    monkeypatch.setattr(LocalGrid, "simulated", False)
    plant, name, changes, _ = FAULTS[what]
    plant(monkeypatch)
    with pytest.raises(ProofError, match=r"round 1.*certificate"):
        federate(uneven(settings, name, **changes))
    assert not [f for r in Ran(directory_of(uneven(settings, name))).rounds for f in r["failures"]]


# -- who is not heard -----------------------------------------------------------------------------


def heard_means(ran: Ran) -> dict[str, float]:
    told = [r["certificate"]["heard"] for r in ran.rounds[1:]]
    return {c: sum(t[c] for t in told) / len(told) for c in told[0]}


def at(settings: Settings, name: str, kind: str) -> dict[str, object]:
    given = uneven(settings, name, **{"run.rounds": 4})
    if kind == "bert":
        return given
    language = {k: v for k, v in settings(kind).items() if k.startswith(("model.", "data.prompt"))}
    iid = {"data.partition": "iid", "lora.target-modules": "c_attn,c_fc"}
    return {**given, **language, **iid}


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    few([n for n, s in STRATEGIES.items() if s().promise == "approximate"], "hetlora"),
)
def test_a_dropped_client_is_below_what_clean_runs_never_reach(
    settings: Settings, monkeypatch: Patch, name: str, kind: str
) -> None:
    given = at(settings, name, kind)
    clean = federate({**given, "run.name": "clean"})
    assert min(heard_means(clean).values()) > 0.4
    assert not any("hardly moved" in w for w in clean.summary["warnings"])
    cls, real = STRATEGIES[name], STRATEGIES[name].aggregate

    def without_2(self: Any, state: Any, uploads: Any, round: Any) -> Any:
        return real(self, state, [u for u in uploads if u.client.id != 2], round)

    monkeypatch.setattr(cls, "aggregate", without_2)
    dropped = federate(given)
    means = heard_means(dropped)
    assert means.pop("2") < 0.3 < min(means.values())
    (warning,) = [w for w in dropped.summary["warnings"] if "hardly moved" in w]
    assert "client 2" in warning
    assert warning.count("client") == 2  # "these clients", and the one


@pytest.mark.parametrize("name", few(["fedex", "ffa", "fedsb", "ravan", "rolora"], "fedsb"))
def test_under_dp_a_clients_numbers_follow_from_what_it_was_sent_and_what_it_released(
    settings: Settings, monkeypatch: Patch, name: str
) -> None:
    """The server computes them itself from the noised upload: no row is needed, so none leaks."""
    from fedlora.federation.server import honesty
    from fedlora.launch.simulate.grid import LocalGrid

    compared = []

    def agrees(
        setting: Any, session: Any, run: Any, upload: Upload, round: Any, received: Any
    ) -> bool:
        _, _, end = received.certificates[upload.client.id]
        key = session.certifier.key(round.number)
        again = honesty._by_model(setting, session, run, upload, round, key)
        assert again is not None
        assert again.keys() == end.keys()
        for n, x in again.items():
            torch.testing.assert_close(end[n], x, rtol=1e-5, atol=1e-5)
        compared.append(upload.client.id)
        return True

    monkeypatch.setattr(honesty, "agrees", agrees)
    monkeypatch.setattr(LocalGrid, "simulated", False)
    private = {"privacy.epsilon": 4.0, "privacy.delta": 1e-3, "run.rounds": 2}
    ran = federate(uneven(settings, name, **private))
    assert len(compared) == sum(len(r["accepted"]) for r in ran.rounds[1:]) > 0


def test_under_client_level_privacy_no_figure_of_the_clients_goes_into_the_log(
    settings: Settings, monkeypatch: Patch
) -> None:
    """Twice as large a step of every client: the certificate's record is the same."""
    private = {"privacy.epsilon": 8.0, "privacy.delta": 1e-3, "privacy.level": "client",
               "clients.ranks": "3", "run.rounds": 1}  # fmt: skip
    one = federate(uneven(settings, "ffa", **private, **{"run.name": "one"}))
    two = federate(uneven(settings, "ffa", **private, **{"run.name": "two", "train.lr": 0.1}))
    assert one.rounds[1]["certificate"] == two.rounds[1]["certificate"]


# -- under secure aggregation ---------------------------------------------------------------------

SECURE = {"secure.aggregation": True, "clients.count": 6, "clients.ranks": "2,3,2,3,2,3",
          "secure.max-weight": 200}  # fmt: skip


@pytest.mark.parametrize("name", few(["ffa", "fedsb", "rolora", "fedsvd", "fedsa"], "ffa"))
def test_of_a_masked_sum_the_round_is_certified_and_starts_one_by_one(
    settings: Settings, name: str
) -> None:
    changes = {**SECURE, "strategy.fedsa.average-at-end": False} if name == "fedsa" else SECURE
    for r in federate(uneven(settings, name, **changes)).rounds[1:]:
        found = r["certificate"]
        assert found["excess"] < 0.7
        assert found["deviation"] < 0.01
        assert len(found["start"]) == (0 if name == "fedsa" else 6)
        assert name == "fedsa" or found["start_excess"] < 0.5


def test_a_wrong_sum_stops_a_secure_run(settings: Settings, monkeypatch: Patch) -> None:
    from fedlora.strategies import ffa

    real = ffa.mean_ranks

    def ninety(*args: Any, **options: Any) -> Factors:
        mean = real(*args, **options)
        return replace(mean, B={m: 0.9 * B for m, B in mean.B.items()})

    monkeypatch.setattr(ffa, "mean_ranks", ninety)
    monkeypatch.setattr("fedlora.federation.server.proof.Proof.enforce", lambda *_: None)
    with pytest.raises(ProofError, match=r"round 1.*certificate"):
        federate(uneven(settings, "ffa", **SECURE))


def test_a_change_that_does_not_fit_costs_the_certificate_and_not_the_update(
    settings: Settings, monkeypatch: Patch
) -> None:
    """Of one client of six: all updates count, and what the others measured is in none's reach."""
    whole = federate(uneven(settings, "ffa", **SECURE, **{"run.rounds": 1, "run.name": "whole"}))
    calls, scales, totals = [0], handlers.public_scales, list[Any]()

    def once(model: Any, names: Any) -> dict[str, float]:
        calls[0] += 1
        return dict.fromkeys(names, 1e-9) if calls[0] == 2 else scales(model, names)

    def decoded(total: Any, *args: Any) -> Any:
        totals.append((total, args[1]))
        return decode(total, *args)

    monkeypatch.setattr(handlers, "public_scales", once)
    monkeypatch.setattr(secure_rounds, "decode", decoded)
    ran = federate(uneven(settings, "ffa", **SECURE, **{"run.rounds": 1}))
    found = ran.rounds[1]["certificate"]
    assert ran.rounds[1]["accepted"] == [0, 1, 2, 3, 4, 5]
    assert ran.adapter == whole.adapter
    assert "changes of 1 of 6 clients were out of range" in found["not_certified"][0]
    assert found["layers"] == {}
    (total, layout), *_ = totals
    changes = [total[place] for key, _, place in layout.places() if is_change(key)]
    assert kstest(np.concatenate(changes) / 2.0**32, "uniform").pvalue > 1e-6


@pytest.mark.slow
def test_the_range_of_a_change_is_not_that_of_the_factors(settings: Settings) -> None:
    wide = {"secure.clipping-range": 1e6, "secure.modulus-bits": 64, "run.rounds": 1}
    for r in federate(uneven(settings, "ffa", **SECURE, **wide)).rounds[1:]:
        assert r["certificate"]["excess"] < 0.7
        assert not r["certificate"]["not_certified"]


def test_the_probes_of_a_sum_are_not_those_that_the_servers_seed_draws(
    settings: Settings, monkeypatch: Patch
) -> None:
    keys: list[str] = []

    def measured(model: Any, key: str, *args: Any) -> Any:
        keys.append(key)
        return measure_as(model, key, *args)

    monkeypatch.setattr(witness, "measure_as", measured)
    monkeypatch.setattr(certifier, "measure_as", measured)
    federate(uneven(settings, "ffa", **SECURE, **{"run.rounds": 2}))
    assert len({*keys}) == 2  # one a round, alike on the server and its clients
    assert all(re.fullmatch(r"certificate/[0-9a-f]{64}", key) for key in keys)
