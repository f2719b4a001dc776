"""The aggregation proof at run time: bugs of public code, planted in a live federation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import ProofError
from fedlora.federation.server import loop
from fedlora.lora import lowrank
from fedlora.lora.adapter import Factors, Pair, dense
from fedlora.strategies import STRATEGIES, fedex, fedsvd, ffa, flora, mixed
from fedlora.strategies.base_log import BaseLog
from fedlora.training.model.moving_base import MovingBase
from tests.support.long import few
from tests.support.tiny_federation import Ran, directory_of, federate, quick

Settings = Callable[..., dict[str, object]]

pytestmark = pytest.mark.usefixtures("precision")
Patch = pytest.MonkeyPatch


def transposed_residual(patch: Patch) -> None:
    """FedEx-LoRA's reference. Where a layer is not square, a broken implementation pads it."""
    real = BaseLog.add

    def add(self: BaseLog, delta: Mapping[str, Any]) -> BaseLog:
        turned = {}
        for m, missed in delta.items():
            W = dense(missed)
            d, k = W.shape
            room = torch.zeros(max(d, k), max(d, k))
            room[:k, :d] = W.T
            turned[m] = room[:d, :k].clone()
        return real(self, turned)

    patch.setattr(BaseLog, "add", add)


def no_scale(patch: Patch) -> None:
    """alpha / r left out where factors are averaged or stacked."""

    def bare(pairs: Sequence[Pair]) -> list[Pair]:
        return [Pair(p.A, p.B) for p in pairs]

    patch.setattr(flora, "weighted", lambda pairs, p: lowrank.stack(bare(pairs), p))
    real = lowrank.mean_and_residual
    patch.setattr(fedex, "mean_and_residual", lambda pairs, p: real(bare(pairs), p))


def no_weights(patch: Patch) -> None:
    """Clients of 10 and of 1,000 examples count the same."""

    def even(p: Sequence[float]) -> list[float]:
        return [1 / len(p)] * len(p)

    patch.setattr(flora, "weighted", lambda pairs, p: lowrank.stack(pairs, even(p)))
    real = lowrank.mean_and_residual
    patch.setattr(fedex, "mean_and_residual", lambda pairs, p: real(pairs, even(p)))


def sum_for_mean(patch: Patch) -> None:
    patch.setattr(flora, "weighted", lambda pairs, p: lowrank.stack(pairs))


def no_residual(patch: Patch) -> None:
    """FedEx without its point: what is left is FedIT."""
    patch.setattr(BaseLog, "add", lambda self, delta: self)


def half_of_s(patch: Patch) -> None:
    """The square root of S on one side, and nothing on the other."""

    def compress(pair: Pair, rank: int) -> Pair:
        U, S, Vh = lowrank.svd(pair)
        return Pair(Vh[:rank].contiguous(), U[:, :rank] * S[:rank].sqrt())

    for module in (fedsvd, flora, fedex):
        if hasattr(module, "compress"):
            patch.setattr(module, "compress", compress)
    real = lowrank.svd
    patch.setattr(
        fedsvd, "svd", lambda pair: (lambda U, S, Vh: (U, S.sqrt(), Vh))(*real(pair)), raising=False
    )


def transposed_fold(patch: Patch) -> None:
    """A base change that lands transposed in the model: square layers raise nothing."""
    real = MovingBase._set_weight

    def set_weight(self: MovingBase, m: str, shift: Tensor | None, *fold: Pair) -> None:
        square = shift is not None and shift.shape[0] == shift.shape[1]
        real(self, m, shift.T if shift is not None and square else shift, *fold)

    patch.setattr(MovingBase, "_set_weight", set_weight)


def first_upload_alone(patch: Patch) -> None:
    """A mean that forgets all but one client."""
    patch.setattr(ffa, "mean_ranks", lambda u, *a, **k: mixed.mean_ranks(list(u)[:1], *a, **k))


MUTANTS: dict[str, tuple[Callable[[Patch], None], str, str]] = {
    "transposed residual, square": (transposed_residual, "fedex", "query"),
    "transposed residual, not square": (transposed_residual, "fedex", "intermediate.dense"),
    "no scale in fedex": (no_scale, "fedex", "intermediate.dense"),
    "no scale in flora": (no_scale, "flora", "query"),
    "no weights in fedex": (no_weights, "fedex", "query"),
    "no weights in flora": (no_weights, "flora", "intermediate.dense"),
    "sum for mean": (sum_for_mean, "flora", "query"),
    "no residual": (no_residual, "fedex", "query"),
    "half of S": (half_of_s, "fedsvd", "query,intermediate.dense"),
    "transposed fold": (transposed_fold, "flora", "query"),
    "one upload alone": (first_upload_alone, "ffa", "query"),
}


def skewed(settings: Settings, name: str, targets: str, **changes: object) -> dict[str, object]:
    """Clients of different size, trained for long enough that their factors differ."""
    uneven = {"data.partition": "dirichlet", "data.alpha": 0.5, "lora.target-modules": targets}
    given = quick(name, **{"train.steps": 3, "run.rounds": 3, "clients.ranks": "2,3", **uneven})
    return settings(**{**given, **changes})


@pytest.mark.parametrize(
    "what", few(MUTANTS, "sum for mean", "transposed residual, square", "one upload alone")
)
def test_a_planted_bug_stops_the_run_before_its_state_is_kept(
    settings: Settings, what: str, monkeypatch: Patch
) -> None:
    plant, name, targets = MUTANTS[what]
    given = skewed(settings, name, targets)
    plant(monkeypatch)
    with pytest.raises(ProofError, match=rf"{name} promises an exact aggregation") as caught:
        federate(given)
    stopped = int(str(caught.value).removeprefix("round ").split(":")[0])
    ran = Ran(directory_of(given))
    assert [r["round"] for r in ran.rounds] == list(range(stopped))
    newest = sorted((ran.directory / "checkpoint").glob("round-*"))[-1]
    assert newest.stem == f"round-{stopped - 1:05}"

    monkeypatch.undo()
    mended = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert mended.adapter == whole.adapter


@pytest.mark.parametrize(
    "name", few(sorted({name for _, name, _ in MUTANTS.values()}), "fedex", "flora")
)
def test_without_a_bug_the_same_runs_pass(settings: Settings, name: str) -> None:
    ran = federate(skewed(settings, name, "query,intermediate.dense"))
    for r in ran.rounds[1:]:
        proof = r["proof"]
        assert proof["promise"] == "exact"
        assert 0 <= proof["deviation"] < proof["bound"]
        assert proof["model_deviation"] < proof["bound"]
        assert proof["norm"] > 0
        assert len(proof["layers"]) == 4
        assert proof["profiles"] == 2


def test_unenforced_the_proof_still_says_what_is_wrong(
    settings: Settings, monkeypatch: Patch
) -> None:
    no_scale(monkeypatch)
    given = skewed(settings, "flora", "query", **{"proof.enforce": False})
    ran = federate(given)
    assert [r["round"] for r in ran.rounds] == [0, 1, 2, 3]
    for r in ran.rounds[1:]:
        assert r["proof"]["deviation"] > 100 * r["proof"]["bound"]


def test_what_is_only_approximate_is_reported_and_not_stopped(settings: Settings) -> None:
    ran = federate(skewed(settings, "fedavg", "query", **{"clients.ranks": "3"}))
    assert STRATEGIES["fedavg"]().promise == "approximate"
    assert ran.rounds[3]["proof"]["deviation"] > 1e-4


def test_a_deviation_that_is_no_number_is_no_proof(settings: Settings, monkeypatch: Patch) -> None:
    real = BaseLog.add

    def add(self: BaseLog, delta: Mapping[str, Any]) -> BaseLog:
        return real(self, {m: dense(x) * float("nan") for m, x in delta.items()})

    monkeypatch.setattr(BaseLog, "add", add)
    monkeypatch.setattr(loop, "check_finite", lambda *_: None)  # which would see it first
    with pytest.raises(ProofError, match="by nan"):
        federate(skewed(settings, "flora", "query"))


def test_the_shared_part_of_fedsa_is_proved(settings: Settings, monkeypatch: Patch) -> None:
    from fedlora.strategies import fedsa

    given = skewed(settings, "fedsa", "query")
    assert federate(given).rounds[3]["proof"]["deviation"] < 2e-5

    def halved(*args: Any, **options: Any) -> Factors:
        mean = mixed.mean_ranks(*args, **options)
        return Factors(mean.scale, {m: A / 2 for m, A in mean.A.items()}, mean.B, other=mean.other)

    monkeypatch.setattr(fedsa, "mean_ranks", halved)
    with pytest.raises(ProofError, match="fedsa"):
        federate({**given, "run.name": "halved"})
