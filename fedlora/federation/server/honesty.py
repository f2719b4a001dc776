"""Finds clients whose certificate does not match their own update, or what they were sent.

A client that sends such numbers is left out, by name.

    first     the change of the pairs that the strategy makes of the upload, u . (trained(x) -
              began(x)), against end - start; and of every other tensor
    then      where they differ, the client's half again: what it was sent, with what it uploaded in
              place, is loaded into the server's own model and measured

The second opinion keeps a helper of a strategy that is wrong from being taken for a lie: then the
numbers agree with the upload as the modules see it, and the certificate says what is wrong. Where
half of the clients or more disagree, or all are this machine, nobody is left out either: it is the
software, and the certificate stops the run.

A client that lies about both alike is not found here: see docs/extend/proof.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, load
from fedlora.federation.server.screening import began
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.lora.adapter import COLUMNS, Adapter, Factors
from fedlora.strategies.base import Client, Round, Upload, travelling, whole_download
from fedlora.training.certificate import (
    FLOAT32,
    SIGMAS,
    WIRE,
    K,
    measure,
    of_tensor,
    signs,
    start_gaps,
)
from fedlora.training.devices import norm_of
from fedlora.training.model.quantized import weight_of


class Honesty:
    """The `Stage` that passes the uploads whose numbers match; the others wait for the end."""

    def __init__(self, setting: Setting, session: Session) -> None:
        self.setting, self.session = setting, session

    @staticmethod
    def applies(setting: Setting, session: Session) -> bool:
        """Can uploads be checked against numbers here, and could a client lie?"""
        config = setting.config
        plain = setting.model.form.kind == "factors" and setting.guarantee != "shared"
        skipped = session.simulated or config.secure.aggregation or config.round.buffer
        return plain and not skipped

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        pass

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        held: list[tuple[Upload, str]] = []
        seen = 0
        for upload in uploads:
            seen += 1
            if why := _against(self.setting, self.session, run, upload, round, received):
                held.append((upload, why))
            else:
                yield upload
            del upload
        if 2 * len(held) >= seen:
            yield from (upload for upload, _ in held)
            return
        for upload, why in held:
            received.take_back(upload.client.id, round, Refusal(FailureKind.BAD, why))

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        return after

    def record(self) -> Mapping[str, Any]:
        return {}


def _against(
    setting: Setting,
    session: Session,
    run: Saved,
    upload: Upload,
    round: Round,
    received: Received,
) -> str:
    """Why a client's numbers are not believed; empty where they are."""
    if not agrees(setting, session, run, upload, round, received):
        return "its certificate's numbers are not those of its own update"
    if setting.guarantee == "exact" and not began_there(setting, session, upload, received):
        return "its certificate says that it did not begin from the model that it was sent"
    return ""


def began_there(setting: Setting, session: Session, upload: Upload, received: Received) -> bool:
    """Are a client's numbers at the start the server's own, to rounding?"""
    asked, start, _ = received.certificates[upload.client.id]
    config = setting.config
    before = session.certifier.before[asked]
    gaps = start_gaps(*before, start, config.wire.dtype, config.model.dtype)
    return all(g.excess <= 1 for g in gaps.values() if not math.isnan(g.found))


def agrees(
    setting: Setting,
    session: Session,
    run: Saved,
    upload: Upload,
    round: Round,
    received: Received,
) -> bool:
    """Do the numbers that came with an upload match it, by the pairs or by the model?"""
    _, start, end = received.certificates[upload.client.id]
    change = {name: end[name] - start[name] for name in start}
    key = session.certifier.key(round.number)
    if _close(setting, run, upload, change, _by_pairs(setting, run, upload, round, key)):
        return True
    seen = _by_model(setting, session, run, upload, round, key)
    return seen is None or _close(
        setting, run, upload, change, {n: x - start[n] for n, x in seen.items()}
    )


def _close(
    setting: Setting,
    run: Saved,
    upload: Upload,
    change: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> bool:
    """Is every number within what sending the upload explains?"""
    part = SIGMAS * (4 * FLOAT32 + 2 * WIRE[setting.config.wire.dtype])
    for name, want in found.items():
        size = _size(setting, run, upload, name)
        if not float((change[name] - want).square().mean().sqrt()) <= part * size + 1e-12:
            return False
    return True


def _size(setting: Setting, run: Saved, upload: Upload, name: str) -> float:
    """What rounding is relative to: s |B| |A|, the server's for what is not sent, and |W|."""
    sent, held = upload.sent, setting.strategy.effective(run.state).factors
    if name in sent.other:
        return float(sent.other[name].double().norm())
    base = norm_of(weight_of(setting.model.adapted[name].get_base_layer()))
    product = max(upload.client.layers[name].scale, held.scale.get(name, 0.0))
    for column in ("A", "B", "R"):
        both = [getattr(x, column).get(name) for x in (sent, held)]
        norms = [float(x.double().norm()) for x in both if x is not None]
        product *= max(norms, default=1.0)
    return product + base


def _by_pairs(
    setting: Setting, run: Saved, upload: Upload, round: Round, key: str
) -> dict[str, Tensor]:
    """What the strategy makes of the upload, less what it makes of an untrained one."""
    strategy, state = setting.strategy, run.state
    first = strategy.trained(state, began(strategy, state, upload, round), round)
    last = strategy.trained(state, upload, round)
    before = strategy.effective(state).factors.other
    found = {m: _of_pair(last, m, key) - _of_pair(first, m, key) for m in upload.client.layers}
    for name, x in upload.sent.other.items():
        found[name] = of_tensor(x, f"{key}/{name}") - of_tensor(before[name], f"{key}/{name}")
    return found


def _of_pair(pairs: Adapter, m: str, key: str) -> Tensor:
    if m not in pairs:
        return torch.zeros(K, dtype=torch.float64)
    A, B, scale = pairs[m].A.double(), pairs[m].B.double(), pairs[m].scale
    x, u = signs(f"{key}/{m}/x", K, A.shape[1]), signs(f"{key}/{m}/u", K, B.shape[0])
    return scale * ((u @ B) * (x @ A.T)).sum(1)


def _by_model(
    setting: Setting, session: Session, run: Saved, upload: Upload, round: Round, key: str
) -> dict[str, Tensor] | None:
    """The end's numbers of the client's half played again; None where it cannot be."""
    strategy, state, model = setting.strategy, run.state, setting.model
    client = replace(upload.client, has_memory=False)
    came = whole_download(strategy, state, client, round, setting.folds)
    factors = _with_sent(strategy.start(came, Factors(), client, round), upload.sent)
    again = travelling(strategy.upload(factors, Factors())[0], came.trainable)
    if not _same(again, upload.sent):
        return None
    load(setting, session, run, state)
    with model.folded(came.fold):
        model.load(factors, came.block)
        return dict(measure(model, key, upload.client.layers, upload.sent.other))


def _with_sent(factors: Factors, sent: Factors) -> Factors:
    """The factors with what was sent in their place; a core may travel as its diagonal blocks."""
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        mine = dict(getattr(factors, column))
        for name, x in getattr(sent, column).items():
            whole = torch.block_diag(*x) if x.ndim == 3 else x
            mine[name] = whole.to(mine[name]) if name in mine else whole
        columns[column] = mine
    return Factors(factors.scale, **columns)


def _same(x: Factors, y: Factors) -> bool:
    left = {(column, name): t for column, name, t in x.items()}
    right = {(column, name): t for column, name, t in y.items()}
    return left.keys() == right.keys() and all(torch.equal(t, right[k]) for k, t in left.items())
