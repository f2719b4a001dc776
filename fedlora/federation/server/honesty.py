"""Whose numbers are not believed: not those of its own update, or not of what it was sent.

Who sends such numbers is left out, by name.

    first     the change of the pairs that the strategy makes of the upload, u . (trained(x) -
              began(x)), against end - start; and of every other tensor
    then      where they differ, the client's half again: what it was sent, with what it uploaded in
              place, is loaded into the server's own model and measured

The second opinion keeps a helper of a strategy that is wrong from being taken for a lie: then the
numbers agree with the upload as the modules see it, and the certificate says what is wrong. Where
half of the clients or more disagree, or all are this machine, nobody is left out either: it is the
software, and the certificate stops the run.

A client that lies about both alike is not found here: see docs/proof.md.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.federation.server.exchange import Gathered
from fedlora.federation.server.screening import began
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.lora.adapter import COLUMNS, Adapter, Factors
from fedlora.strategies.base import Round, Upload, travelling, whole_download
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

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


def believed(
    server: "FederatedLora", uploads: Iterator[Upload], round: Round, gathered: Gathered
) -> Iterator[Upload]:
    """The uploads whose clients' numbers are their own; the others wait for the end."""
    plain = server.model.form.kind == "factors" and server.promise != "shared"
    if server.secure or server.simulated or server.config.round.buffer or not plain:
        yield from uploads
        return
    held: list[tuple[Upload, str]] = []
    seen = 0
    for upload in uploads:
        seen += 1
        if why := _against(server, upload, round, gathered):
            held.append((upload, why))
        else:
            yield upload
        del upload
    if 2 * len(held) >= seen:
        yield from (upload for upload, _ in held)
        return
    for upload, why in held:
        i = upload.client.id
        gathered.accepted.remove(i)
        del gathered.clients[i], gathered.certificates[i]
        server.refuse(i, round, Refusal(FailureKind.BAD, why), gathered)


def _against(server: "FederatedLora", upload: Upload, round: Round, gathered: Gathered) -> str:
    """Why a client's numbers are not believed; empty where they are."""
    if not agrees(server, upload, round, gathered):
        return "its certificate's numbers are not those of its own update"
    if server.promise == "exact" and not began_there(server, upload, gathered):
        return "its certificate says that it did not begin from the model that it was sent"
    return ""


def began_there(server: "FederatedLora", upload: Upload, gathered: Gathered) -> bool:
    """Are a client's numbers at the start the server's own, to rounding?"""
    asked, start, _ = gathered.certificates[upload.client.id]
    config = server.config
    gaps = start_gaps(*server.certifier.before[asked], start, config.wire.dtype, config.model.dtype)
    return all(g.excess <= 1 for g in gaps.values() if not math.isnan(g.found))


def agrees(server: "FederatedLora", upload: Upload, round: Round, gathered: Gathered) -> bool:
    """Are the numbers that came with an upload its own, by either opinion?"""
    _, start, end = gathered.certificates[upload.client.id]
    change = {name: end[name] - start[name] for name in start}
    key = server.certifier.key(round.number)
    if _close(server, upload, change, _by_pairs(server, upload, round, key)):
        return True
    seen = _by_model(server, upload, round, key)
    return seen is None or _close(
        server, upload, change, {n: x - start[n] for n, x in seen.items()}
    )


def _close(
    server: "FederatedLora",
    upload: Upload,
    change: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> bool:
    """Is every number within what sending the upload explains?"""
    part = SIGMAS * (4 * FLOAT32 + 2 * WIRE[server.config.wire.dtype])
    for name, want in found.items():
        size = _size(server, upload, name)
        if not float((change[name] - want).square().mean().sqrt()) <= part * size + 1e-12:
            return False
    return True


def _size(server: "FederatedLora", upload: Upload, name: str) -> float:
    """What rounding is relative to: s |B| |A|, the server's for what is not sent, and |W|."""
    sent, held = upload.sent, server.strategy.effective(server.state).factors
    if name in sent.other:
        return float(sent.other[name].double().norm())
    base = float(server.model.adapted[name].get_base_layer().weight.detach().float().norm())
    product = max(upload.client.layers[name].scale, held.scale.get(name, 0.0))
    for column in ("A", "B", "R"):
        both = [getattr(x, column).get(name) for x in (sent, held)]
        norms = [float(x.double().norm()) for x in both if x is not None]
        product *= max(norms, default=1.0)
    return product + base


def _by_pairs(server: "FederatedLora", upload: Upload, round: Round, key: str) -> dict[str, Tensor]:
    """What the strategy makes of the upload, less what it makes of an untrained one."""
    strategy, state = server.strategy, server.state
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
    server: "FederatedLora", upload: Upload, round: Round, key: str
) -> dict[str, Tensor] | None:
    """The end's numbers of the client's half played again; None where it cannot be."""
    strategy, state, model = server.strategy, server.state, server.model
    client = replace(upload.client, has_memory=False)
    folds = server.config.ranks.absent == "fold"
    came = whole_download(strategy, state, client, round, folds)
    factors = _with_sent(strategy.start(came, Factors(), client, round), upload.sent)
    again = travelling(strategy.upload(factors, Factors())[0], came.trainable)
    if not _same(again, upload.sent):
        return None
    server.load(strategy.effective(state))
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
