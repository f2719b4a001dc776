"""The certificate: what it measures is the model, and what the proof cannot see stops the run."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from tiny_federation import Ran, directory_of, federate, quick
from torch import Tensor

from fedlora import client
from fedlora.adapter import Factors, Pair
from fedlora.errors import ProofError
from fedlora.lowrank import extend, wide
from fedlora.memory import ClientMemory
from fedlora.strategies import fedex, fedsb, lora_a2, ravan
from fedlora.strategies.base import BaseLog, Upload, Version
from fedlora.strategies.ffa import FFA
from fedlora.strategies.lora_a2 import LoRAA2

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
    def completed(state: Factors, upload: Upload, m: str) -> Tensor:
        H, whole = upload.sent.R[m], wide(state.R[m]).clone()
        whole[: len(H)] = wide(H)
        return whole

    patch.setattr(ravan, "completed", completed)


def on_clients(patch: Patch, planted: Callable[[Any], Any]) -> None:
    """The clients' strategy alone is another."""
    real = client.Desk.open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, *args: Any) -> Any:
        desk = real(cls, *args)
        return dataclasses.replace(desk, strategy=planted(desk.strategy))

    patch.setattr(client.Desk, "open", classmethod(opened))


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


def newest_change_only(patch: Patch) -> None:
    real = ClientMemory.base_to

    def base_to(self: ClientMemory, number: int) -> list[Version]:
        return [replace(v, snapshot=True) for v in real(self, number)[-1:]]

    patch.setattr(ClientMemory, "base_to", base_to)


def newest_residual_only(patch: Patch) -> None:
    """A late joiner lacks all residuals, and is sent the last."""
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


WORKERS: dict[str, object] = {"simulate.workers": 2}
"""A process of its own for clients: within the server's they share its base."""

FAULTS: dict[str, tuple[Callable[[Patch], None], str, dict[str, object], int]] = {
    "scale not folded, fedex": (fedex_scale, "fedex", {}, 1),
    "scale not folded, fedsb": (fedsb_scale, "fedsb", {}, 1),
    "scale not folded, ravan": (ravan_scale, "ravan", {}, 1),
    "the server's alpha / r, ffa": (ffa_scale, "ffa", {}, 1),
    "other ranks, lora-a2": (other_ranks, "lora-a2", {}, 1),
    "newest base change only, fedex": (newest_change_only, "fedex", WORKERS, 3),
    "newest residual only, fedex": (newest_residual_only, "fedex",
                                    {**WORKERS, "clients.per-round": 2, "run.rounds": 5}, 3),
    "head not averaged": (head_not_averaged, "fedex", {}, 1),
    "head of one client": (head_of_one_client, "fedex", {}, 1),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
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
